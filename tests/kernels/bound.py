"""A pytest plugin: the compiled binding on the CPU, before a stand-in library that records each call of a kernel.

What is registered with torch's dispatcher stays there, so test_binding.py runs pytest with it in a process of its own.
The stand-in writes 1 into every result: rows at their stride, and nothing beside them.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from convrot_kernels.backends import cutlass
from convrot_kernels.backends.cutlass import binding, build, library
from convrot_kernels.backends.cutlass.variants import of_arch

ARCH = "sm_90a"
C_TYPES = {ctypes.c_void_p: "void*", ctypes.c_int: "int", ctypes.c_int64: "int64_t", ctypes.c_float: "float"}
MOST = 40  # arguments of a kernel
HEAD = """
#include <stdint.h>
#include <string.h>
struct Entry { const char* name; int count; double values[%d]; } entries[64];
int total = 0, result = 0;
extern "C" {
int convrot_abi_version() { return %d; }
const char* convrot_source_key() { return "%s"; }
const char* convrot_error(int code) { return "it did not work"; }
}
template <class... T> void record(const char* name, T... values) {
  Entry& entry = entries[total++ %% 64];
  double all[] = {double(int64_t(values))...};
  entry.name = name, entry.count = sizeof...(values);
  memcpy(entry.values, all, sizeof(all));
}
template <class T> void fill(void* out, int64_t stride, int rows, int columns, T value) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) static_cast<T*>(out)[i * stride + j] = value;
}
void fill(int dtype, void* out, int64_t stride, int rows, int columns) {
  if (dtype == 0) fill<float>(out, stride, rows, columns, 1.f);
  else fill<uint16_t>(out, stride, rows, columns, dtype == 1 ? 0x3c00 : 0x3f80);
}
"""
BODIES = {
    "convrot_norm_rope_fp8": "int c = a22 * a23; fill(0, a17, 1, a19, 1); "
    "void* out[] = {a14, a15, a16}; for (void* one : out) fill<char>(one, c, (a20 + a21) * a19, c, 0x38);",
    "convrot_norm_rope": "void* out[] = {a14, a15, a16}; int c = a20 * a21; "
    "for (int i = 0; i < 3; ++i) if (out[i]) fill(a6, out[i], c, (a18 + a19) * a17, c);",
    "convrot_low_rank_down": "int c = a16 * a17; fill(a22, a18, c, a19, c);",
    "convrot_low_rank_up": "char* to = (char*)a0; int n[] = {a8, a9, a10, a11}, c[] = {a12, a13, a14, a15}; "
    "for (int i = 0; i < a20; ++i) fill(a27, to + 2 * c[i], a1, a26, n[i]);",
    "convrot_gemv_joined": "int n = 0; for (int i = 0; i < a0; ++i) n += ((int*)a4)[i]; fill(a11, a10, a12, a13, n);",
    "convrot_gemv": "fill(a13, a12, a14, a15, a16);",
    "convrot_rotate_quantize": "int c = a18 ? a15 / 2 : a15; fill<char>(a12, c, a14, c, 1), fill(0, a13, 1, a14, 1);",
}


class Kernels:
    """The stand-in: what was called, and the code that every kernel answers."""

    def __init__(self, path: Path) -> None:
        self.library = library.Library(path, ARCH)
        self._functions = ctypes.CDLL(str(path))
        self._functions.taken.restype = ctypes.c_char_p
        self.in_python = 0

    def answer(self, code: int) -> None:
        ctypes.c_int.in_dll(self._functions, "result").value = code

    def take(self) -> list[tuple[str, tuple[float, ...]]]:
        """(name, arguments) of the calls since the last time."""
        calls, values = [], (ctypes.c_double * MOST)()
        total = ctypes.c_int.in_dll(self._functions, "total")
        for index in range(total.value):
            name = self._functions.taken(index, values)
            calls.append((name.decode(), tuple(values[: self._functions.count(index)])))
        total.value = 0
        return calls


def _function(name: str, types: tuple[Any, ...], out: int | None = None) -> str:
    arguments = [f"{C_TYPES[kind]} a{index}" for index, kind in enumerate(types)]
    body = next((body for start, body in BODIES.items() if name.startswith(start)), "")
    body = body if out is None else f"fill({out}, a10, a11, a12, a13);"
    # a float argument is recorded in millionths
    names = ", ".join(f"a{i} * 1e6f" if kind is ctypes.c_float else f"a{i}" for i, kind in enumerate(types))
    answer = f'record("{name}", {names}); if (!result) {{ {body} }} return result;'
    return f'extern "C" int {name}({", ".join(arguments)}) {{ {answer} }}\n'


def compile_kernels(target: Path) -> None:
    text = HEAD % (MOST, build.ABI_VERSION, build.source_key(ARCH))
    text += 'extern "C" const char* taken(int i, double* to) { '
    text += "memcpy(to, entries[i % 64].values, sizeof(entries[0].values)); "
    text += 'return entries[i % 64].name; }\nextern "C" int count(int i) { return entries[i % 64].count; }\n'
    text += "".join(_function(name, types) for name, types in library._PLAIN.items())
    codes = {"fp32": 0, "fp16": 1, "bf16": 2}
    text += "".join(_function(variant.name, library._GEMM, codes[variant.out]) for variant in of_arch(ARCH))
    source = target.with_suffix(".cpp")
    source.write_text(text)
    subprocess.run(["g++", "-shared", "-fPIC", "-fpermissive", "-w", "-o", str(target), str(source)], check=True)


@pytest.fixture(scope="session", autouse=True)
def _kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    folder = Path(os.environ["CONVROT_TEST_FOLDER"])
    kernels = Kernels(folder / "kernels.so")
    binding.register(folder / "binding.so", None)
    assert binding._loaded is not None
    library.of = lambda device: (ARCH, kernels.library)
    library.index_of = lambda device: -1  # what torch calls the index of the CPU
    library.sm_count = lambda index: 132
    cutlass.why_not = lambda device: None
    torch.cuda.device = lambda device: nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *device: SimpleNamespace(cuda_stream=0)  # type: ignore[assignment]
    serve = binding.serve

    def counted(*arguments: Any) -> Any:
        kernels.in_python += 1
        return serve(*arguments)

    binding.serve = counted
    return kernels


@pytest.fixture
def kernels(_kernels: Kernels) -> Iterator[Kernels]:
    """Nothing learned, nothing recorded."""
    binding.forget()
    _kernels.take()
    _kernels.in_python = 0
    yield _kernels
    _kernels.answer(0)
