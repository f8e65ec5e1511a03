"""rotate_quantize and its prologues on the compiled library: rotate_quantize.cu."""

import torch
from torch import Tensor

from convrot_kernels.backends.cutlass import library
from convrot_kernels.backends.cutlass.products import DTYPES

NONE, GELU, MODULATE, SILU_MUL, CAT_GELU = range(5)  # Prologue in the source
_FUNCTIONS = {
    torch.bfloat16: "convrot_rotate_quantize_bf16",
    torch.float16: "convrot_rotate_quantize_fp16",
    torch.float32: "convrot_rotate_quantize_fp32",
}


def rows_of(x: Tensor, values: int = 4) -> Tensor:
    """(..., K) -> (M, K): a view wherever `values` can be loaded at once, else a copy."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if rows.stride(1) != 1 or rows.data_ptr() % (values * x.element_size()) or rows.stride(0) % values:
        rows = x.new_empty(rows.shape).copy_(rows)
    return rows


def vectors_of(scale: Tensor, shift: Tensor, values: int = 4) -> tuple[Tensor, Tensor]:
    """(K,) or (B, K) -> (B, K): views where `values` can be loaded at once at one stride (chunks), else copies."""
    scale, shift = torch.atleast_2d(scale), torch.atleast_2d(shift)
    aligned = all(vector.data_ptr() % (values * vector.element_size()) == 0 for vector in (scale, shift))
    if aligned and scale.stride() == shift.stride() and scale.stride(1) == 1 and scale.stride(0) % values == 0:
        return scale, shift
    return scale.contiguous().clone(), shift.contiguous().clone()


def _quantize(
    prologue: int,
    x: Tensor,
    y: Tensor | None,
    vectors: tuple[Tensor, Tensor] | None,
    eps: float,
    group_size: int,
    bits: int,
    packed: bool,
    rule: str,
    clip: float,
) -> tuple[Tensor, Tensor]:
    if rule != "absmax":
        raise library.KernelError(f"rotate_quantize: rule {rule!r} is not compiled; use_backend('reference') has it")
    seam = x.shape[-1] if prologue == CAT_GELU else 0
    k = x.shape[-1] + (y.shape[-1] if y is not None and prologue == CAT_GELU else 0)
    shape = x.shape[:-1]
    codes = x.new_empty((*shape, k // 2 if packed else k), dtype=torch.uint8 if packed else torch.int8)
    row_scale = x.new_empty(shape, dtype=torch.float32)
    if row_scale.numel() == 0:
        return codes, row_scale
    _, ours = library.of(x.device)
    with torch.cuda.device(x.device):
        rows, more = rows_of(x), None if y is None else rows_of(y)
        scale, shift = (None, None) if vectors is None else vectors_of(*vectors)
        samples = 1 if scale is None else scale.shape[0]
        ours.call(
            _FUNCTIONS[x.dtype],
            *(rows.data_ptr(), rows.stride(0)),
            *((None, 0) if more is None else (more.data_ptr(), more.stride(0))),
            seam,
            *((None, 0) if scale is None else (scale.data_ptr(), DTYPES[scale.dtype])),
            *((None, 0) if shift is None else (shift.data_ptr(), DTYPES[shift.dtype])),
            *(0 if scale is None or samples == 1 else scale.stride(0), rows.shape[0] // samples, eps),
            *(codes.data_ptr(), row_scale.data_ptr(), rows.shape[0], k, group_size, bits, packed, prologue, clip),
            torch.cuda.current_stream().cuda_stream,
        )
    return codes, row_scale


def rotate_quantize(
    x: Tensor, group_size: int = 256, bits: int = 4, *, packed: bool = False, rule: str = "absmax", clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(..., K) -> codes int8 (..., K) or packed uint8 (..., K/2), scale fp32 (...)."""
    return _quantize(NONE, x, None, None, 0.0, group_size, bits, packed, rule, clip)


def rotate_quantize_gelu(
    x: Tensor, group_size: int = 256, bits: int = 4, *, packed: bool = False, rule: str = "absmax", clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """rotate_quantize(gelu(x))."""
    return _quantize(GELU, x, None, None, 0.0, group_size, bits, packed, rule, clip)


def rotate_quantize_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    group_size: int = 256,
    bits: int = 4,
    *,
    packed: bool = False,
    rule: str = "absmax",
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """rotate_quantize(layer_norm(x) * (1 + scale) + shift)."""
    return _quantize(MODULATE, x, None, (scale, shift), eps, group_size, bits, packed, rule, clip)


def rotate_quantize_silu_mul(
    x: Tensor,
    y: Tensor,
    group_size: int = 256,
    bits: int = 4,
    *,
    packed: bool = False,
    rule: str = "absmax",
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """rotate_quantize(silu(x) * y)."""
    return _quantize(SILU_MUL, x, y, None, 0.0, group_size, bits, packed, rule, clip)


def rotate_quantize_cat_gelu(
    x: Tensor,
    y: Tensor,
    group_size: int = 256,
    bits: int = 4,
    *,
    packed: bool = False,
    rule: str = "absmax",
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """rotate_quantize([x | gelu(y)]), one scale over both halves."""
    return _quantize(CAT_GELU, x, y, None, 0.0, group_size, bits, packed, rule, clip)
