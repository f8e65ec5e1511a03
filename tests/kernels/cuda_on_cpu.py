"""CUDA C++ of csrc/ as plain C++: what its threads compute can be tested without a GPU (test_*_on_cpu.py).

Its text is translated, headers included: an asm statement becomes a call of the function in cuda_on_cpu.h that bears
the instruction's name, a launch one of `launch`. What a GPU does beyond that, timing above all, stays the GPU's.
"""

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

from convrot_kernels.backends.cutlass import build, library

SHIM = Path(__file__).parent / "cuda_on_cpu.h"
ASM = re.compile(r'asm(?: volatile)?\(((?:"[^"]*"|[^";])*)\);')
OPERAND = re.compile(r'"[=+]?\w"\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)')
LAUNCH = re.compile(r"([\w<>:, ]+)<<<(.+), ([\w* ]+), \w+, (?:static_cast<cudaStream_t>\()?stream\)?>>>\(([^;]*)\);")
SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
KNOWN = set(re.findall(r"^(?:inline )?void (\w+)\(", SHIM.read_text(), re.MULTILINE))


def _called(statement: re.Match[str]) -> str:
    """An asm statement as a call; one that nothing asked of a CPU uses, as an end."""
    name = re.sub(r"\W", "_", statement[1].lstrip().removeprefix('"').split(" ")[0])
    operands = OPERAND.findall(statement[1])
    return f"on_cpu::{name}({', '.join(operands)});" if name in KNOWN else "std::abort();"


def translated(text: str) -> str:
    """CUDA C++ -> C++, with the headers of ours that it includes."""
    text = re.sub(r'#include "([^"]+)"', lambda m: translated((build.HERE / "csrc" / m[1]).read_text()), text)
    text = re.sub(r"#include <cuda\w*\.h>|#pragma (once|unroll.*)", "", text)
    text = SHARED.sub(r"auto* const \2 = on_cpu::dynamic_shared<\1>();", ASM.sub(_called, text))
    return LAUNCH.sub(r"on_cpu::launch(\2, \3, [&] { \1(\4); });", text)


def compile_for_cpu(name: str, target: Path) -> None:
    """csrc/`name`.cu -> a shared library for ctypes."""
    source = target.with_suffix(".cpp")
    source.write_text(f'#include "{SHIM}"\n' + translated((build.HERE / "csrc" / f"{name}.cu").read_text()))
    flags = ("-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w")
    subprocess.run(["g++", *flags, "-o", str(target), str(source)], check=True)


class OnCpu:
    """What stands in for a Library: `call` runs a kernel here."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self.names: list[str] = []

    def call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._functions, name)
        function.argtypes = library._PLAIN[name]
        code = function(*arguments)
        assert code == 0, f"{name}: error code {code}"
        self.names.append(name)
