"""Which backend runs an op: an ordered table, read top to bottom, and nothing else.

A backend is a module with the functions of `reference` that it speeds up, `why_not(device) -> str | None` and
`preferred_codes(device)`, `preferred_layout(device)`; `why_not_OP(device)` where an op needs more than the others. It
must import on a machine that cannot run it.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_int64
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

# name -> module, imported when first asked
BACKENDS: dict[str, str] = {
    "reference": "convrot_kernels.reference",
    "triton": "convrot_kernels.backends.triton",
    "cutlass": "convrot_kernels.backends.cutlass",
}

_FASTEST_FIRST = ("cutlass", "triton", "reference")

# op -> backends in the order in which `auto` tries them
ORDER: dict[str, tuple[str, ...]] = {
    "rotate": ("triton", "reference"),
    "rotate_quantize": _FASTEST_FIRST,
    "rotate_quantize_gelu": _FASTEST_FIRST,
    "rotate_quantize_modulate": _FASTEST_FIRST,
    "rotate_quantize_silu_mul": _FASTEST_FIRST,
    "rotate_quantize_cat_gelu": _FASTEST_FIRST,
    "scaled_mm": _FASTEST_FIRST,
    "scaled_mm_out": _FASTEST_FIRST,
    "scaled_mm_cat": _FASTEST_FIRST,
    "scaled_mm_gate_residual": _FASTEST_FIRST,
    "norm_rope": _FASTEST_FIRST,
    "norm_rope_joint": _FASTEST_FIRST,
    "norm_rope_fp8": _FASTEST_FIRST,
    "norm_rope_joint_fp8": _FASTEST_FIRST,
    "attention_fp8": _FASTEST_FIRST,
    "low_rank_down": _FASTEST_FIRST,
    "low_rank_up": _FASTEST_FIRST,
    "pack_int4": ("reference",),
    "unpack_int4": ("reference",),
}

# on a GPU without the reference, which would take many times the whole step: there the op is optional
GPU_ORDER: dict[str, tuple[str, ...]] = {"attention_fp8": ("cutlass", "triton")}

AUTO = "auto"
_chosen: ContextVar[str] = ContextVar("convrot_backend", default=AUTO)
named = c_int64(0)  # use_backend blocks that name a backend, in all threads: compiled code reads it where it lies
_named_lock = threading.Lock()


class BackendError(RuntimeError):
    """No backend can run the op, the named one cannot, or nobody knows the name. Lists every reason."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on the backend `name`, or fail; "auto" goes back to choosing.

    Holds for this thread (and async task) alone: a new thread starts with "auto".
    """
    if name != AUTO and name not in BACKENDS:
        known = ", ".join((AUTO, *BACKENDS))
        raise BackendError(f"use_backend: unknown backend {name!r}; use one of {known}")
    token = _chosen.set(name)
    _count_named(int(name != AUTO))
    try:
        yield
    finally:
        _count_named(-int(name != AUTO))
        _chosen.reset(token)


def _count_named(more: int) -> None:
    with _named_lock:
        named.value += more


@cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=1)


def pick(op: str, device: torch.device | str) -> tuple[str, ModuleType]:
    """The name and module of the backend that runs `op` on `device` now."""
    device, chosen = torch.device(device), _chosen.get()
    reasons: dict[str, str] = {}
    order = GPU_ORDER.get(op, ORDER[op]) if device.type == "cuda" else ORDER[op]
    for name in order if chosen == AUTO else (chosen,):
        module = import_module(BACKENDS[name])
        reason = module.why_not(device) if hasattr(module, op) else f"does not implement {op}"
        if reason is None and (needs_more := getattr(module, f"why_not_{op}", None)) is not None:
            reason = (why_not := needs_more(device)) and f"for {op}, {why_not}"
        if reason is None:
            _warn_of_slower(name, device, reasons)
            return name, module
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if chosen == AUTO:
        raise BackendError(f"{op}: no backend can run on {device}: {listed}")
    raise BackendError(f'{op}: the chosen backend cannot run on {device}: {listed}; use_backend("auto") picks another')


def _warn_of_slower(name: str, device: torch.device, reasons: dict[str, str]) -> None:
    """A GPU that a faster backend could serve: it only has to be built or installed, and its reason says how."""
    for faster, reason in reasons.items() if device.type == "cuda" else ():
        if "run `" in reason:
            _warn_once(f"the {name} backend serves this GPU, there are faster kernels: {faster}: {reason}")


def select(op: str, device: torch.device | str) -> Callable[..., Any]:
    """The function that runs `op` on `device` now: the chosen backend's, else the first in ORDER that can."""
    function: Callable[..., Any] = getattr(pick(op, device)[1], op)
    return function


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Backend -> None if it can run on `device`, else why not. Default: the GPU if there is one, else the CPU."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {name: import_module(BACKENDS[name]).why_not(where) for name in BACKENDS}


def preferred_codes(device: torch.device | str) -> str:
    """ "int8" or "packed": the form of 4-bit activation codes that scaled_mm on `device` reads fastest."""
    codes: str = pick("scaled_mm", device)[1].preferred_codes(torch.device(device))
    return codes


def preferred_layout(device: torch.device | str) -> str:
    """The `b_layout` in which scaled_mm on `device` reads 4-bit weights fastest: an argument of prepare_weight."""
    layout: str = pick("scaled_mm", device)[1].preferred_layout(torch.device(device))
    return layout
