"""With CONVROT_LIBRARIES=FOLDER a wheel carries that folder's libraries (`nox -s kernels`); else it is pure Python."""

import os
import platform
import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = "convrot_kernels/backends/cutlass/lib"  # build.SHIPPED


class LibrariesHook(BuildHookInterface):
    """Adds *.so and *.json, and names the platform after the newest glibc symbol that a library asks for."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it packs."""
        folder = os.environ.get("CONVROT_LIBRARIES")
        if not folder or version == "editable":
            return
        libraries = sorted(Path(folder).glob("*.so"))
        if not libraries:
            raise FileNotFoundError(f"CONVROT_LIBRARIES={folder} holds no *.so; run `nox -s kernels`")
        asked = [int(minor) for file in libraries for minor in re.findall(rb"GLIBC_2\.(\d+)", file.read_bytes())]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_{max(17, *asked)}_{platform.machine()}"
        for file in (*libraries, *sorted(Path(folder).glob("*.json"))):
            build_data["force_include"][str(file)] = f"{SHIPPED}/{file.name}"
