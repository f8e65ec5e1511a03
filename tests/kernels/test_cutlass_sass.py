"""Which tensor-core instruction each kind of GEMM is compiled to, read from its machine code: no GPU is needed."""

import os
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from convrot_kernels.backends.cutlass import build
from convrot_kernels.backends.cutlass.build import BuildError, units
from convrot_kernels.backends.cutlass.variants import of_arch

# what runs a product: (arch, weight, activation) -> the instruction, which no emulation contains
INSTRUCTIONS = [
    ("sm_80", "s4", "s4", r"IMMA\.16864\.S4\.S4"),
    ("sm_80", "s8", "s8", r"IMMA\.16832\.S8\.S8"),
    ("sm_90a", "s4", "s8", r"IGMMA\.64x\d+x32\.S8\.S8"),
    ("sm_100", "s8", "s8", r"IMMA\.16832\.S8\.S8"),
    ("sm_120", "s8", "s8", r"IMMA\.16832\.S8\.S8"),
]


def _cuobjdump() -> str | None:
    """The one on PATH, or the one that triton carries."""
    triton = find_spec("triton")
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else Path()
    return shutil.which("cuobjdump", path=f"{beside}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.slow
@pytest.mark.skipif(_cuobjdump() is None, reason="needs cuobjdump")
@pytest.mark.parametrize(("arch", "weight", "activation", "instruction"), INSTRUCTIONS)
def test_products_are_tensor_core_instructions_of_their_arch(
    arch: str, weight: str, activation: str, instruction: str, tmp_path: Path
) -> None:
    try:
        toolkit = build.find_toolkit()
    except BuildError as error:
        pytest.skip(str(error))
    wanted = next(v.name for v in of_arch(arch) if (v.weight, v.activation) == (weight, activation))
    unit = next(unit for unit in units(arch) if unit.name == wanted)
    made = build.compile_unit(unit, arch, toolkit, tmp_path)
    command = [str(_cuobjdump()), "-sass", str(made)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"code for {arch}\n" in text
    found = Counter(re.findall(r"\b(IG?MMA\.\S+|CALL)", text))
    assert found.pop("CALL", 0) == 0  # emulated s4 is a called routine of two IMMA.16832.S8
    assert all(re.fullmatch(instruction + r"\S*", name) for name in found)
    assert sum(found.values()) >= 8
