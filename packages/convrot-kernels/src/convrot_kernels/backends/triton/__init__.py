"""The portable GPU backend: one kernel file per operation, compiled by Triton at the first call, no toolkit needed.

Importing this package imports no Triton: a kernel file is loaded by the first call of its op. Under TRITON_INTERPRET=1
Triton's interpreter runs the same kernels on CPU tensors, slowly: that is how they are tested without a GPU.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from convrot_kernels.backends.cudnn import why_not as why_not_attention_fp8
from convrot_kernels.reference import pack_int4, unpack_int4  # once per weight: PyTorch's own kernels do

__all__ = [
    "attention_fp8",
    "low_rank_down",
    "low_rank_up",
    "norm_rope",
    "norm_rope_fp8",
    "norm_rope_joint",
    "norm_rope_joint_fp8",
    "pack_int4",
    "preferred_codes",
    "preferred_layout",
    "rotate",
    "rotate_quantize",
    "rotate_quantize_cat_gelu",
    "rotate_quantize_gelu",
    "rotate_quantize_modulate",
    "rotate_quantize_silu_mul",
    "scaled_mm",
    "scaled_mm_cat",
    "scaled_mm_gate_residual",
    "scaled_mm_out",
    "unpack_int4",
    "why_not",
    "why_not_attention_fp8",
]

LEAST_CAPABILITY = (8, 0)  # bfloat16 and int8 tensor-core products


def _loaded_late(op: str, file: str) -> Callable[..., Any]:
    @cache
    def function() -> Callable[..., Any]:
        loaded: Callable[..., Any] = getattr(import_module(f"{__name__}.{file}"), op)
        return loaded

    def run(*args: Any, **options: Any) -> Any:
        return function()(*args, **options)

    run.__name__ = run.__qualname__ = op
    return run


attention_fp8 = _loaded_late("attention_fp8", "norm_rope_kernel")
low_rank_down = _loaded_late("low_rank_down", "low_rank_kernel")
low_rank_up = _loaded_late("low_rank_up", "low_rank_kernel")
norm_rope = _loaded_late("norm_rope", "norm_rope_kernel")
norm_rope_joint = _loaded_late("norm_rope_joint", "norm_rope_kernel")
norm_rope_fp8 = _loaded_late("norm_rope_fp8", "norm_rope_kernel")
norm_rope_joint_fp8 = _loaded_late("norm_rope_joint_fp8", "norm_rope_kernel")
rotate = _loaded_late("rotate", "rotate_kernel")
rotate_quantize = _loaded_late("rotate_quantize", "rotate_quantize_kernel")
rotate_quantize_gelu = _loaded_late("rotate_quantize_gelu", "rotate_quantize_kernel")
rotate_quantize_modulate = _loaded_late("rotate_quantize_modulate", "rotate_quantize_kernel")
rotate_quantize_silu_mul = _loaded_late("rotate_quantize_silu_mul", "rotate_quantize_kernel")
rotate_quantize_cat_gelu = _loaded_late("rotate_quantize_cat_gelu", "rotate_quantize_kernel")
scaled_mm = _loaded_late("scaled_mm", "scaled_mm_kernel")
scaled_mm_cat = _loaded_late("scaled_mm_cat", "scaled_mm_kernel")
scaled_mm_out = _loaded_late("scaled_mm_out", "scaled_mm_kernel")
scaled_mm_gate_residual = _loaded_late("scaled_mm_gate_residual", "scaled_mm_kernel")


@cache
def why_not(device: torch.device) -> str | None:
    """None where this backend runs, else the reason it cannot."""
    if find_spec("triton") is None:
        return "Triton is not installed, run `pip install triton`"
    if os.environ.get("TRITON_INTERPRET") == "1" and device.type in ("cpu", "cuda"):
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if torch.version.cuda is None:
        return "was not tried on AMD GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return (
            f"needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
        )
    return None


def preferred_codes(device: torch.device) -> str:
    """int8: the product takes activation codes to the tensor cores as they are in memory."""
    return "int8"


def preferred_layout(device: torch.device) -> str:
    """halves128: the two nibbles of a byte belong to two contiguous runs of activation codes."""
    return "halves128"
