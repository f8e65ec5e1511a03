"""The compiled binding: csrc/binding.cpp serves the ops of a GPU without Python once this file has taught it a kernel.

Found, checked and loaded once, when the first library of kernels is; never needed: without it Python serves every call.
Its slow path is the op of the same name in `convrot_python`, that is `serve` here. Unlike a backend it stands above
dispatch: it takes calls before dispatch sees them, and none while a backend is named.
"""

import ctypes
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from convrot_kernels import dispatch
from convrot_kernels.backends.cutlass import build

SOURCE = build.HERE / "csrc" / "binding.cpp"
LEAST_TORCH = (2, 10)  # whose stable C functions the source keeps to: what is built once serves all later ones
_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = ("-std=c++17", "-O2", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-shared", _TARGET)
_GEMM, _GEMV, _QUANTIZER, _NORM_ROPE, _LOW_RANK_DOWN, _LOW_RANK_UP, _NORM_ROPE_FP8 = range(7)  # Kind in the source
_TEXTS = ("rule", "b_layout")  # str arguments, of which the binding hands over the address

_thread = threading.local()
_loaded: ctypes.CDLL | None = None


# building


def name() -> str:
    """The file's name: a hash of the source and the flags, and of no version of torch."""
    return f"convrot-binding-{build.digest(SOURCE.read_text(), *FLAGS)}.so"


def _torch_is_too_old() -> str | None:
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return None if found >= LEAST_TORCH else f"needs torch 2.10 or newer, found {torch.__version__}"


def _torch_folder(part: str) -> Path:
    return Path(torch.__file__).parent / part


def compile_to(target: Path, key: str = "CUDA") -> None:
    """One shared library for the dispatch key `key`; torch's libraries are in the process already, hence no rpath."""
    torchs = (f"-I{_torch_folder('include')}", f"-L{_torch_folder('lib')}", "-Wl,--no-as-needed", "-ltorch_cpu")
    command = ["g++", *FLAGS, f"-DCONVROT_KEY={key}", str(SOURCE), "-o", str(target), *torchs]
    build.run_compiler(command, "the binding")


def why_not_buildable() -> str | None:
    """None where `build_binding` can work, else what is missing."""
    if (too_old := _torch_is_too_old()) is not None:
        return too_old
    if shutil.which("g++") is None:
        return "g++ is not on PATH"
    headers = _torch_folder("include") / "torch" / "csrc" / "stable" / "c" / "shim.h"
    return None if headers.exists() else f"torch comes without its headers: there is no {headers}"


def build_binding(folder: Path | None = None) -> Path:
    """-> the binding in `folder` (default: the cache), compiled unless it is there."""
    folder = folder or build.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name()
    with FileLock(target.with_suffix(".lock")):
        if build.defect(target) is not None:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / "made.so"
                compile_to(made)
                build.publish(made, target, {"torch": torch.__version__})
    return target


def build_command(folder: Path | None = None) -> int:
    """The binding's part of `python -m convrot_kernels build`. Exit code 0, also where it is left out, else 1."""
    if (why := why_not_buildable()) is not None:
        sys.stderr.write(f"build: without the binding, which only saves time between kernels: {why}\n")
        return 0
    try:
        sys.stdout.write(f"{build_binding(folder)}\n")
    except build.BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


# loading


@cache
def _find() -> tuple[Path | None, str]:
    if (too_old := _torch_is_too_old()) is not None:
        return None, too_old
    path, broken = build.find_file(name())
    return path, "" if path else f"{broken or 'not built'}; run `{build.COMMAND}`"


@cache
def _stream_function() -> int | None:
    """The address of torch's answer to `which stream`, which only a CUDA build of torch has."""
    try:
        function = ctypes.CDLL(str(_torch_folder("lib") / "libtorch_cuda.so")).aoti_torch_get_current_cuda_stream
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def why_not() -> str | None:
    """None where GPU ops are served without Python, or will be from the first kernel on; else the reason."""
    if _stream_function() is None:
        return "needs a build of torch with CUDA"
    return _find()[1] or None


@cache
def load() -> None:
    """Put the binding before the Python implementation of the GPU ops, where it is built. Once in a process."""
    path, stream = _find()[0], _stream_function()
    if path is not None and stream is not None:
        register(path, stream)


def register(path: Path, stream: int | None) -> None:
    """Load a binding and hand it to torch's dispatcher. It cannot be taken back."""
    global _loaded
    try:
        binding = ctypes.CDLL(str(path))
        binding.convrot_register.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        binding.convrot_learn.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int)
        binding.convrot_fail.argtypes = (ctypes.c_char_p,)
    except (OSError, AttributeError):  # made for another machine; what Python does instead is the same, only later
        return
    if binding.convrot_register(stream, ctypes.addressof(dispatch.named)) == 0:
        _loaded = binding


def forget() -> None:
    """Look for the binding again, and for every kernel."""
    _find.cache_clear()
    if _loaded is None:
        load.cache_clear()
    else:
        _loaded.convrot_forget()


# the slow path


class Call(NamedTuple):
    """A C function that was called, and with what."""

    name: str
    function: Any
    arguments: tuple[Any, ...]


def note(name: str, function: Any, arguments: tuple[Any, ...]) -> None:
    """A C function has been called in this thread: `serve`, if it is at work, learns from it."""
    calls: list[Call] | None = getattr(_thread, "calls", None)
    if calls is not None:
        calls.append(Call(name, function, arguments))


def serve(run: Callable[..., Any], results: int, first: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run an op in Python for the binding and teach it the kernel; an exception is kept for `original`."""
    options = {name: _text(value) if name in _TEXTS else value for name, value in options.items()}
    outer, calls = getattr(_thread, "calls", None), list[Call]()
    _thread.error, _thread.calls = None, calls
    try:
        result = run(first, *args, **options)
    except BaseException as error:  # even an interrupt would lose its type between here and the caller
        assert _loaded is not None, "only the binding calls this"
        _thread.error = error
        _loaded.convrot_fail(str(error).encode())
        made = tuple(first.new_empty(0) for _ in range(results))
        return made if results > 1 else next(iter(made), None)
    finally:
        _thread.calls = outer
    if calls:
        returned = result if isinstance(result, tuple) else (result,)
        _teach(list(_tensors((first, *args, *options.values(), *returned))), calls)
    return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from _tensors(value)


def _text(address: int) -> str:
    return ctypes.string_at(address).decode()


def _teach(tensors: list[Tensor], calls: list[Call]) -> None:
    """Only where one kernel did it all, on the operands and into the results as they lie: no copy, no padding."""
    first = calls[0]
    addresses = {tensor.data_ptr() for tensor in tensors}
    if any(call.name != first.name for call in calls) or not addresses <= set(first.arguments):
        return
    kind, detail = _GEMM, first.arguments[-2]  # a GEMM's number of multiprocessors
    if first.name.startswith("convrot_rotate_quantize"):
        kind, detail = _QUANTIZER, 0
    elif first.name == "convrot_norm_rope":
        kind, detail = _NORM_ROPE, 0
    elif first.name == "convrot_norm_rope_fp8":
        kind, detail = _NORM_ROPE_FP8, 0
    elif first.name.startswith("convrot_low_rank"):
        kind, detail = (_LOW_RANK_UP if first.name.endswith("up") else _LOW_RANK_DOWN), 0
    elif first.name == "convrot_gemv":
        kind, detail = _GEMV, first.arguments[1]  # the weight's format
    assert _loaded is not None, "only the binding calls this"
    _loaded.convrot_learn(ctypes.cast(first.function, ctypes.c_void_p), kind, detail, len(calls))


def original(error: RuntimeError) -> BaseException | None:
    """The exception of `serve` whose message `error` carries, once; None where `error` is an exception of its own."""
    kept: BaseException | None = getattr(_thread, "error", None)
    _thread.error = None
    return kept if kept is not None and str(kept) == str(error) else None
