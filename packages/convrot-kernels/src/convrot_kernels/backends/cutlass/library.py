"""The compiled library of a GPU: found, checked, loaded with ctypes once; or the sentence that says why not.

The ABI is plain C: pointers, sizes, strides, the stream, an error code back. No torch symbol is linked.
"""

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from convrot_kernels.backends.cutlass import binding, build
from convrot_kernels.backends.cutlass.variants import ARCHS, arch_of, of_arch

_EPILOGUE = (c_void_p, c_int, c_void_p, c_int, c_void_p, c_int64)  # bias, gate, each with its dtype; residual, stride
_GEMM = (c_void_p, c_void_p, c_void_p, c_void_p, *_EPILOGUE, c_void_p, c_int64, *(c_int,) * 5, c_void_p)
_PLAIN: dict[str, tuple[Any, ...]] = {
    "convrot_gemv": (
        *(c_void_p, c_int, c_void_p, c_int, c_void_p, c_void_p),
        *(*_EPILOGUE, c_void_p, c_int, c_int64, c_int, c_int, c_int, c_void_p),
    ),
    "convrot_gemv_joined": (
        *(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_int, c_void_p, c_int),
        *(c_void_p, c_int, c_int64, c_int, c_int, c_void_p),
    ),
    "convrot_unpack": (c_void_p, c_void_p, c_int64, c_void_p),
    "convrot_norm_rope": (
        *(c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int),
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int, *(c_void_p,) * 5, *(c_int,) * 5, c_float, c_void_p),
    ),
    "convrot_norm_rope_fp8": (
        *(c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int),
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int, *(c_void_p,) * 7, *(c_int,) * 5, c_float, c_void_p),
    ),
    "convrot_widen_fp8": (c_void_p, c_void_p, c_void_p, c_int, c_int, c_int64, c_void_p),
    "convrot_low_rank_down": (
        *(c_void_p, c_int64, c_void_p, c_int64, c_int, c_void_p, c_int, c_void_p, c_int, c_int64, c_int, c_float),
        *(*(c_void_p,) * 4, c_int, c_int, c_void_p, *(c_int,) * 4, c_void_p),
    ),
    "convrot_low_rank_up": (
        *(c_void_p, c_int64, c_void_p, c_int64, *(c_void_p,) * 4, *(c_int,) * 8, *(c_float,) * 4),
        *(c_int, c_int, c_void_p, c_int, c_int64, c_int, c_int, c_int, c_void_p),
    ),
    **{
        f"convrot_rotate_quantize_{name}": (
            *(c_void_p, c_int64, c_void_p, c_int64, c_int),
            *(c_void_p, c_int, c_void_p, c_int, c_int64, c_int, c_float),
            *(c_void_p, c_void_p, *(c_int,) * 6, c_float, c_void_p),
        )
        for name in ("bf16", "fp16", "fp32")
    },
}


class KernelError(RuntimeError):
    """A kernel could not be launched, or has no code for what it was asked; the message says why."""


class LibraryError(RuntimeError):
    """The library cannot be used; the message is the reason that why_not gives."""


class Library:
    """The functions of one library file, checked to be ours: `call(name, ...)` raises on an error code."""

    def __init__(self, path: Path, arch: str) -> None:
        remedy = f"run `{build.COMMAND} --arch {arch}`"
        try:
            self._functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise LibraryError(f"{path} cannot be loaded: {error}; {remedy}") from error
        try:
            self._functions.convrot_source_key.restype = self._functions.convrot_error.restype = c_char_p
            abi, key = self._functions.convrot_abi_version(), self._functions.convrot_source_key().decode()
            if (abi, key) != (build.ABI_VERSION, build.source_key(arch)):
                raise LibraryError(f"{path} was built from other sources (ABI {abi}, key {key}); {remedy}")
            for name, types in (*_PLAIN.items(), *((variant.name, _GEMM) for variant in of_arch(arch))):
                getattr(self._functions, name).argtypes = types
        except AttributeError as error:
            raise LibraryError(f"{path} is not a library of this project: {error}; {remedy}") from error

    def call(self, name: str, *arguments: Any) -> None:
        """Run one C function."""
        function = getattr(self._functions, name)
        if code := function(*arguments):
            sentence = self._functions.convrot_error(code).decode()
            raise KernelError(f"{name}: {sentence} (code {code})")
        binding.note(name, function, arguments)


@lru_cache(maxsize=64)
def _arch(index: int) -> str | None:
    return arch_of(torch.cuda.get_device_capability(index))


@lru_cache(maxsize=64)
def sm_count(index: int) -> int:
    """Multiprocessors of a GPU, asked once."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@lru_cache(maxsize=len(ARCHS))
def _load(arch: str) -> Library | str:
    path, why = build.find(arch)
    if path is None:
        return why
    try:
        library = Library(path, arch)
    except LibraryError as error:
        return str(error)
    binding.load()
    return library


def index_of(device: torch.device) -> int:
    """A CUDA device's index; of plain "cuda" the current one, or 0 where there is no GPU to ask."""
    return (torch.cuda.current_device() if torch.cuda.is_available() else 0) if device.index is None else device.index


def why_not(device: torch.device) -> str | None:
    """None where the library of this GPU is there and can run. An answer holds until the process ends or `forget`."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, got {device.type}"
    return _reason(index_of(device))


@lru_cache(maxsize=64)  # asked at every call of an op
def _reason(index: int) -> str | None:
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, this is a ROCm build of torch"
    if not torch.cuda.is_available():
        return "torch sees no GPU: no driver, or a build of torch without CUDA"
    if index >= torch.cuda.device_count():
        return f"there is no cuda:{index} here"
    arch = _arch(index)
    if arch is None:
        major, minor = torch.cuda.get_device_capability(index)
        return f"no code for compute capability {major}.{minor}; there is for 8.x, 9.0, 10.0, 10.3, 11.0, 12.0 and 12.1"
    loaded = _load(arch)
    return loaded if isinstance(loaded, str) else None


def forget() -> None:
    """Look for libraries again: after a build in this process."""
    _load.cache_clear()
    _reason.cache_clear()
    binding.forget()


def of(device: torch.device) -> tuple[str, Library]:
    """-> (arch, library) of a device for which why_not is None."""
    arch = _arch(index_of(device))
    library = _load(arch) if arch else None
    if arch is None or not isinstance(library, Library):
        raise LibraryError(f"cutlass: {why_not(device)}")
    return arch, library
