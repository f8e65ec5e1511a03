"""ConvRot kernels: regular-Hadamard rotation, 4- and 8-bit quantization and low-bit matrix products for PyTorch."""

from convrot_kernels.dispatch import (
    BackendError,
    available_backends,
    preferred_codes,
    preferred_layout,
    use_backend,
)
from convrot_kernels.ops import (
    low_rank_down,
    low_rank_up,
    norm_rope,
    norm_rope_joint,
    pack_int4,
    prepare_weight,
    restore_weight,
    rotate,
    rotate_quantize,
    rotate_quantize_cat_gelu,
    rotate_quantize_gelu,
    rotate_quantize_modulate,
    rotate_quantize_silu_mul,
    scaled_mm,
    scaled_mm_gate_residual,
    scaled_mm_out,
    unpack_int4,
)
from convrot_kernels.reference import hadamard
from convrot_kernels.weights import quantize_weight

__all__ = [
    "BackendError",
    "available_backends",
    "hadamard",
    "low_rank_down",
    "low_rank_up",
    "norm_rope",
    "norm_rope_joint",
    "pack_int4",
    "preferred_codes",
    "preferred_layout",
    "prepare_weight",
    "quantize_weight",
    "restore_weight",
    "rotate",
    "rotate_quantize",
    "rotate_quantize_cat_gelu",
    "rotate_quantize_gelu",
    "rotate_quantize_modulate",
    "rotate_quantize_silu_mul",
    "scaled_mm",
    "scaled_mm_gate_residual",
    "scaled_mm_out",
    "unpack_int4",
    "use_backend",
]
