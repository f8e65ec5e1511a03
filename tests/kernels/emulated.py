"""sm_80's library compiled for compute capability 9.0, which emulates s4: exact, 20 times slower than bf16, for tests.

Nothing in the package builds or finds such a library; test_cutlass_emulated.py is told where it lies:
    python tests/kernels/emulated.py FOLDER --jobs 2
    CONVROT_EMULATED=FOLDER pytest tests/kernels/test_cutlass_emulated.py
"""

import argparse
import os
import sys
from pathlib import Path
from unittest import mock

from convrot_kernels.backends.cutlass import build

ARCH = "sm_80"
GENCODE = "-gencode=arch=compute_90,code=sm_90"


def build_emulated(folder: Path, jobs: int = 1) -> Path:
    """-> the library in `folder`, named as sm_80's. Its objects are kept apart from those of the real one."""
    apart = {"CONVROT_CACHE": str(build.cache_folder() / "emulated")}
    with mock.patch.dict(os.environ, apart), mock.patch.object(build, "_gencode", return_value=GENCODE):
        return build.build(ARCH, jobs, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compile the sm_80 kernels for compute capability 9.0, for tests.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    sys.stdout.write(f"{build_emulated(options.folder, options.jobs)}\n")
