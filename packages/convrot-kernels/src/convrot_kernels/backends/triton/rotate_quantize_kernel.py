"""rotate_quantize: y = prologue(x) H; scale = max(clip * max|y| / qmax, 1e-10); codes = round_half_even(y / scale).

x, y (M, K) fp16, bf16 or fp32, any row stride; gain and shift (K,) or a row per sample, any stride; codes int8 (M, K)
or packed uint8 (M, K/2), low nibble = even column; row scale fp32 (M,). One program a row.
One pass where the row fits the registers of a program, else two over the row: its maximum, then its codes (the second
read finds L2). Prologues are variants of this one kernel and round once to the dtype of x.

The maximum is taken over the bits of |y| as integers: NaN and inf stand above all finite values there, so the row rule
costs one comparison a row, and integers have a warp-wide reduction. Codes are rounded by adding 1.5 * 2^23, which
leaves the integer in the low byte. Where 16-bit inputs meet ties (fine codes, small groups) the division is exact: a
reciprocal alone misses them; elsewhere one FMA multiplies by it and rounds (2e-6 of the codes are off by a step).
Terms between the two factors of H: 2 for 4-bit codes of 16-bit inputs in groups of 256 (2e-6 of the codes are off by a
step), else 3 (none of 9 million).

On an H200 (bf16, no prologue, 4 bits, 4608 rows) fastest are one pass of 4096 columns and 4 warps at K = 3072 (21 us),
and two of 1024 columns and 1 warp at 12288 (87 us) and 15360 (109 us, against 140 in one pass of 16384). Lost there:
the product with H_256 itself (5 to 10 times slower), butterflies by reshape and split (2 to 5 times), transposing
between the factors (up to 15 %), two passes of 512, 2048, 4096 and 8192 columns.
Not tried: three parts of a power of two instead of padding K = 3072 to 4096, several rows a program.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from convrot_kernels.backends.triton.device_functions import (
    INTERPRETED,
    LEAST_COLUMNS,
    SHRINK,
    loaded_tables,
    rotated,
    rounded,
    tables,
)
from convrot_kernels.backends.triton.rows import as_rows, per_batch
from convrot_kernels.reference import QMAX, SCALE_FLOOR

ONE_PASS_COLUMNS = 16384  # a longer row spills at 8 warps
FEW_ROWS = 512  # below, a program has an SM to itself and its latency counts
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: the sum's last bit is worth 1
FLOOR = tl.constexpr(SCALE_FLOOR)
INF = tl.constexpr(float("inf"))
TINY = tl.constexpr(2.0**-80)  # brings the squares of the largest fp32 back into range


class Blocks(NamedTuple):
    """Columns that a program holds at a time, how many times it moves on, its warps."""

    columns: int
    steps: int
    warps: int


def pick_blocks(m: int, k: int, group_size: int) -> Blocks:
    """One pass while the row is short or rows are few, else two: long rows leave too few programs an SM."""
    least, padded = LEAST_COLUMNS[group_size], triton.next_power_of_2(k)
    if padded <= 4096 or (m < FEW_ROWS and padded <= ONE_PASS_COLUMNS):
        columns = max(least, padded)
        return Blocks(columns, 1, min(8, max(1, columns // 1024)))
    columns, warps = (8192, 8) if m < FEW_ROWS else (1024, 1)
    return Blocks(max(least, columns), triton.cdiv(k, max(least, columns)), warps)


@triton.jit
def _gelu(x):
    u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))  # = x / 2 * (1 + tanh(u)), accurate in the negative tail too


@triton.jit
def values(
    x_row, y_row, gain_row, shift_row, columns, K, split, mean, spread, reduced, PROLOGUE: tl.constexpr
):  # fmt: skip
    """-> (COLUMNS,) in the dtype of x: what is rotated; 0 beyond K."""
    inside = columns < K
    dtype: tl.constexpr = x_row.dtype.element_ty
    if PROLOGUE == "cat_gelu":
        first = columns < split
        x = tl.load(x_row + columns, mask=first, other=0.0)
        y = tl.load(y_row + (columns - split), mask=inside & (columns >= split), other=0.0).to(tl.float32)
        return tl.where(first, x, rounded(_gelu(y), dtype))
    x = tl.load(x_row + columns, mask=inside, other=0.0)
    if PROLOGUE == "gelu":
        x = rounded(_gelu(x.to(tl.float32)), dtype)
    if PROLOGUE == "silu_mul":
        x = x.to(tl.float32)
        y = tl.load(y_row + columns, mask=inside, other=0.0).to(tl.float32)
        x = rounded(x / (1.0 + tl.exp(-x)) * y, dtype)
    if PROLOGUE == "modulate":
        gain = 1.0 + tl.load(gain_row + columns, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_row + columns, mask=inside, other=0.0).to(tl.float32)
        normal = (x.to(tl.float32) * reduced - mean) * spread
        x = rounded(tl.where(inside, normal * gain + shift, 0.0), dtype)
    return x


@triton.jit
def _moments(x_row, K, reduced, COLUMNS: tl.constexpr, STEPS: tl.constexpr):
    """-> mean and variance of the row times `reduced`, the variance from a second look at the row."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for step in range(STEPS):
        columns = step * COLUMNS + tl.arange(0, COLUMNS)
        total += tl.load(x_row + columns, mask=columns < K, other=0.0).to(tl.float32) * reduced
    mean = tl.sum(total) / K
    squares = tl.zeros((COLUMNS,), tl.float32)
    for step in range(STEPS):
        columns = step * COLUMNS + tl.arange(0, COLUMNS)
        x = tl.load(x_row + columns, mask=columns < K, other=0.0).to(tl.float32) * reduced
        centred = tl.where(columns < K, x - mean, 0.0)
        squares += centred * centred
    return mean, tl.sum(squares) / K


@triton.jit
def normed(x_row, K, eps, COLUMNS: tl.constexpr, STEPS: tl.constexpr):
    """-> mean, spread and `reduced` of a row: its LayerNorm is (x * reduced - mean) * spread."""
    mean, variance = _moments(x_row, K, 1.0, COLUMNS, STEPS)
    reduced = tl.where(variance < INF, 1.0, TINY)
    if reduced < 1.0:  # squares that leave fp32
        mean, variance = _moments(x_row, K, reduced, COLUMNS, STEPS)
    return mean, tl.rsqrt(variance + eps * reduced), reduced


@triton.jit
def _largest(y):
    """-> the bits of max|y| as an integer, above those of inf if y holds NaN."""
    return tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def _row_scale(largest, clip, QMAX: tl.constexpr, SHRUNK: tl.constexpr):
    """-> whether the row is finite, its scale."""
    reach = largest.to(tl.float32, bitcast=True) * SHRUNK
    finite = reach < INF  # false for NaN
    return finite, tl.where(finite, tl.maximum(tl.div_rn(reach * clip, QMAX * 1.0), FLOOR), float("nan"))


@triton.jit
def _quotient(y, divisor):
    """y / divisor as IEEE rounds it; a row has one divisor, so on a GPU its reciprocal and two FMAs do (Markstein)."""
    if INTERPRETED:  # its fma rounds twice
        return tl.div_rn(y, tl.zeros_like(y) + divisor)
    else:
        divisors = tl.zeros_like(y) + divisor
        reciprocals = tl.zeros_like(y) + tl.div_rn(1.0, divisor)
        near = y * reciprocals
        return tl.fma(tl.fma(-near, divisors, y), reciprocals, near)


@triton.jit
def _codes(
    y, scale, finite, QMAX: tl.constexpr, SHRUNK: tl.constexpr, CLIPPED: tl.constexpr, TIES: tl.constexpr
):  # fmt: skip
    """-> int32 in the shape of y, the code in the low byte; 0 in a row that is not finite."""
    divisor = scale * (1.0 / SHRUNK)  # exact
    if not (TIES or CLIPPED or INTERPRETED):
        reciprocal = tl.where(finite, tl.div_rn(1.0, divisor), 0.0)
        y = tl.where(finite, y, 0.0)
        return tl.fma(y, tl.zeros_like(y) + reciprocal, tl.zeros_like(y) + MAGIC).to(tl.int32, bitcast=True)
    if CLIPPED:  # far beyond qmax a quotient need not be right, but FMAs need it finite
        limit = divisor * (4.0 * QMAX)
        y = tl.minimum(tl.maximum(y, -limit), limit)
    v = _quotient(y, divisor)
    if CLIPPED:
        v = tl.minimum(tl.maximum(v, -QMAX * 1.0), QMAX * 1.0)
    return tl.where(finite, (v + MAGIC).to(tl.int32, bitcast=True), 0)


@triton.jit
def _store(codes_row, codes, start, K, COLUMNS: tl.constexpr, PACKED: tl.constexpr):
    if PACKED:
        low, high = tl.split(tl.reshape(codes, (COLUMNS // 2, 2)))
        places = start // 2 + tl.arange(0, COLUMNS // 2)
        tl.store(codes_row + places, ((low & 15) | ((high & 15) << 4)).to(tl.uint8), mask=places < K // 2)
    else:
        columns = start + tl.arange(0, COLUMNS)
        tl.store(codes_row + columns, tl.reshape(codes.to(tl.int8), (COLUMNS,)), mask=columns < K)


@triton.jit
def _rotate_quantize(
    x_ptr, y_ptr, gain_ptr, shift_ptr, codes_ptr, scale_ptr, right_ptr, left_ptr,
    K, split, stride_x, stride_y, stride_gain, stride_shift, rows_per_sample, eps, clip,
    PROLOGUE: tl.constexpr, GROUP: tl.constexpr, SHRUNK: tl.constexpr, TERMS: tl.constexpr, QMAX: tl.constexpr,
    CLIPPED: tl.constexpr, TIES: tl.constexpr, PACKED: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row, y_row = x_ptr + row * stride_x, y_ptr + row * stride_y
    gain_row, shift_row = x_row, x_row  # read by modulate alone
    codes_row = codes_ptr + row * (K // 2 if PACKED else K)
    right, left = loaded_tables(right_ptr, left_ptr, GROUP)

    mean, spread, reduced = 0.0, 1.0, 1.0
    if PROLOGUE == "modulate":
        sample = row // rows_per_sample
        gain_row, shift_row = gain_ptr + sample * stride_gain, shift_ptr + sample * stride_shift
        mean, spread, reduced = normed(x_row, K, eps, COLUMNS, STEPS)

    if STEPS == 1:
        columns = tl.arange(0, COLUMNS)
        x = values(x_row, y_row, gain_row, shift_row, columns, K, split, mean, spread, reduced, PROLOGUE)
        y = rotated(x, right, left, COLUMNS, GROUP, TERMS)
        finite, scale = _row_scale(_largest(y), clip, QMAX, SHRUNK)
        _store(codes_row, _codes(y, scale, finite, QMAX, SHRUNK, CLIPPED, TIES), 0, K, COLUMNS, PACKED)
    else:
        largest = tl.full((), 0, tl.int32)
        for step in range(STEPS):
            columns = step * COLUMNS + tl.arange(0, COLUMNS)
            x = values(x_row, y_row, gain_row, shift_row, columns, K, split, mean, spread, reduced, PROLOGUE)
            largest = tl.maximum(largest, _largest(rotated(x, right, left, COLUMNS, GROUP, TERMS)))
        finite, scale = _row_scale(largest, clip, QMAX, SHRUNK)
        for step in range(STEPS):
            columns = step * COLUMNS + tl.arange(0, COLUMNS)
            x = values(x_row, y_row, gain_row, shift_row, columns, K, split, mean, spread, reduced, PROLOGUE)
            y = rotated(x, right, left, COLUMNS, GROUP, TERMS)
            codes = _codes(y, scale, finite, QMAX, SHRUNK, CLIPPED, TIES)
            _store(codes_row, codes, step * COLUMNS, K, COLUMNS, PACKED)
    tl.store(scale_ptr + row, scale)


def _launch(
    prologue: str,
    x: Tensor,
    y: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    group_size: int = 256,
    bits: int = 4,
    *,
    packed: bool = False,
    rule: str = "absmax",
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    assert rule == "absmax", f"the kernel computes no other scale rule, got {rule!r}"
    rows, more = as_rows(x), as_rows(x if y is None else y)
    k = rows.shape[1] + (more.shape[1] if prologue == "cat_gelu" else 0)
    codes_shape, dtype = ((*x.shape[:-1], k // 2), torch.uint8) if packed else ((*x.shape[:-1], k), torch.int8)
    codes = torch.empty(codes_shape, dtype=dtype, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    m = rows.shape[0]
    if m == 0:
        return codes, scale
    gain, gain_stride, sample_rows = per_batch(gain, x.shape)
    shift, shift_stride, _ = per_batch(shift, x.shape)
    blocks = pick_blocks(m, k, group_size)
    coarse = bits == 4 and x.dtype != torch.float32
    terms, ties = 2 if coarse and group_size <= 256 else 3, not coarse or group_size < 256
    with torch.cuda.device_of(x):
        _rotate_quantize[(m,)](
            rows, more, gain, shift, codes, scale, *tables(group_size, x.dtype, x.device),
            k, rows.shape[1], rows.stride(0), more.stride(0), gain_stride, shift_stride, sample_rows, eps, clip,
            prologue, group_size, SHRINK[group_size], terms, QMAX[bits], clip < 1, ties, packed,
            blocks.columns, blocks.steps,
            num_warps=blocks.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale


def rotate_quantize(
    x: Tensor, group_size: int = 256, bits: int = 4, *, packed: bool = False, rule: str = "absmax", clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(..., K) -> codes int8 (..., K) or packed uint8 (..., K/2), scale fp32 (...)."""
    return _launch("none", x, None, None, None, 0.0, group_size, bits, packed=packed, rule=rule, clip=clip)


def rotate_quantize_gelu(
    x: Tensor, group_size: int = 256, bits: int = 4, *, packed: bool = False, rule: str = "absmax", clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """rotate_quantize(gelu(x))."""
    return _launch("gelu", x, None, None, None, 0.0, group_size, bits, packed=packed, rule=rule, clip=clip)


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
    return _launch("modulate", x, None, scale, shift, eps, group_size, bits, packed=packed, rule=rule, clip=clip)


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
    return _launch("silu_mul", x, y, None, None, 0.0, group_size, bits, packed=packed, rule=rule, clip=clip)


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
    """rotate_quantize([x | gelu(y)])."""
    return _launch("cat_gelu", x, y, None, None, 0.0, group_size, bits, packed=packed, rule=rule, clip=clip)
