"""Which backend runs an op: an ordered table, read top to bottom, and nothing else.

A backend is a module with the functions of `reference` that it speeds up, `why_not(device) -> str | None` and
`preferred_codes(device)`, `preferred_layout(device)`. It must import on a machine that cannot run it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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

# op -> backends in the order in which `auto` tries them. triton and cutlass stand last, where only use_backend reaches
# them, until their tests have run on a GPU: so far Triton's interpreter and compilers alone have seen them.
ORDER: dict[str, tuple[str, ...]] = {
    "rotate": ("reference", "triton"),
    "rotate_quantize": ("reference", "triton", "cutlass"),
    "rotate_quantize_gelu": ("reference", "triton", "cutlass"),
    "rotate_quantize_modulate": ("reference", "triton", "cutlass"),
    "rotate_quantize_silu_mul": ("reference", "triton", "cutlass"),
    "rotate_quantize_cat_gelu": ("reference", "triton", "cutlass"),
    "scaled_mm": ("reference", "triton", "cutlass"),
    "scaled_mm_out": ("reference", "triton", "cutlass"),
    "scaled_mm_gate_residual": ("reference", "triton", "cutlass"),
    "pack_int4": ("reference",),
    "unpack_int4": ("reference",),
}

AUTO = "auto"
_chosen: ContextVar[str] = ContextVar("convrot_backend", default=AUTO)


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
    try:
        yield
    finally:
        _chosen.reset(token)


def pick(op: str, device: torch.device | str) -> tuple[str, ModuleType]:
    """The name and module of the backend that runs `op` on `device` now."""
    device, chosen = torch.device(device), _chosen.get()
    reasons = {}
    for name in ORDER[op] if chosen == AUTO else (chosen,):
        module = import_module(BACKENDS[name])
        reason = module.why_not(device) if hasattr(module, op) else f"does not implement {op}"
        if reason is None:
            return name, module
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if chosen == AUTO:
        raise BackendError(f"{op}: no backend can run on {device}: {listed}")
    raise BackendError(f'{op}: the chosen backend cannot run on {device}: {listed}; use_backend("auto") picks another')


def select(op: str, device: torch.device | str) -> Callable[..., Any]:
    """The function that runs `op` on `device` now: the chosen backend's, else the first in ORDER that can."""
    function: Callable[..., Any] = getattr(pick(op, device)[1], op)
    return function


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Backend -> None if it can run on `device`, else why not. Default: the GPU if there is one, else the CPU."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {name: import_module(path).why_not(where) for name, path in BACKENDS.items()}


def preferred_codes(device: torch.device | str) -> str:
    """ "int8" or "packed": the form of 4-bit activation codes that scaled_mm on `device` reads fastest."""
    codes: str = pick("scaled_mm", device)[1].preferred_codes(torch.device(device))
    return codes


def preferred_layout(device: torch.device | str) -> str:
    """The `b_layout` in which scaled_mm on `device` reads 4-bit weights fastest: an argument of prepare_weight."""
    layout: str = pick("scaled_mm", device)[1].preferred_layout(torch.device(device))
    return layout
