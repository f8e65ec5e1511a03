"""CUTLASS backend: the compiled library of this GPU. `build.py` makes it, nothing here compiles.

variants.py (which kernels), generate.py (their text), build.py (text -> library), library.py (load and check),
products.py, quantize.py, norm_rope.py and low_rank.py (the ops), binding.py (the ops without Python). Importing this
touches neither CUDA nor the library.
"""

from convrot_kernels.backends.cudnn import why_not as why_not_attention_fp8
from convrot_kernels.backends.cutlass.library import why_not
from convrot_kernels.backends.cutlass.low_rank import low_rank_down, low_rank_up
from convrot_kernels.backends.cutlass.norm_rope import (
    attention_fp8,
    norm_rope,
    norm_rope_fp8,
    norm_rope_joint,
    norm_rope_joint_fp8,
)
from convrot_kernels.backends.cutlass.products import (
    preferred_codes,
    preferred_layout,
    scaled_mm,
    scaled_mm_cat,
    scaled_mm_gate_residual,
    scaled_mm_out,
)
from convrot_kernels.backends.cutlass.quantize import (
    rotate_quantize,
    rotate_quantize_cat_gelu,
    rotate_quantize_gelu,
    rotate_quantize_modulate,
    rotate_quantize_silu_mul,
)
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
