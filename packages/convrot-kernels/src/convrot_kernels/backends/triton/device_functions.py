"""What the kernels share: rounding to 16 bits, products of fp32 on 16-bit tensor cores, the rotation of a tile.

fp32 operands are split into bf16 terms, v = high + middle + low, exact with three (8 + 8 + 8 bits) and 2^-17 relative
with two. Every entry of H is one power of two up to its sign, so each product is exact and sums are fp32.

A group of 256 is a 16 x 16 matrix X, row by row, and its rotation H_16 X H_16; one of 1024 is a 64 x 16 matrix and
H_64 X H_16. Groups of 16 and 64 take one product with H itself: fewer steps, and groups that share a tile do not meet.

The tables hold entries smaller than those of H, by 2 sqrt(n) over both factors (SHRINK): no partial sum of finite
inputs overflows, and the caller multiplies by SHRINK, which is exact unless the rotation itself leaves fp32.
Tables are loaded, not computed in the kernel: Triton spreads only a loaded operand over a batch without shared memory.

Triton's interpreter multiplies the bit patterns of bf16 operands and truncates when it rounds to bf16 (seen in 3.9):
where it runs, operands become fp32 and rounding is spelled out on the bits. The numbers are the same.
Not tried: tf32 terms; one product with H_256 is 5 to 10 times slower (docs of rotate_quantize_kernel.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SHRINK = {16: 8.0, 64: 16.0, 256: 32.0, 1024: 64.0}  # group size -> 2 sqrt(n)
LEAST_COLUMNS = {16: 256, 64: 1024, 256: 256, 1024: 1024}  # group size -> columns of the least tile: dots need 16 rows

_kept_tables: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}


def _signs(n: int, device: torch.device) -> Tensor:
    """-> (n, n), n up to 64: -1 where an odd number of base-4 digits of row and column add up to 3, else 1."""
    index = torch.arange(n, device=device)
    differ = index[:, None] ^ index[None, :]  # digits add up to 3 exactly where they differ in both bits
    threes = differ & (differ >> 1) & 0b010101
    return 1 - 2 * ((threes ^ (threes >> 2) ^ (threes >> 4)) & 1)


def tables(group_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> the right and the left factor of the rotation for inputs of `dtype`; what a graph captures is not kept.

    The first call on a device waits for its stream once, so that no other stream reads them half-written.
    """
    key = (group_size, dtype, device)
    if key in _kept_tables:
        return _kept_tables[key]
    one_factor = group_size <= 64
    right = _signs(group_size if one_factor else 16, device) * (0.5 / group_size if one_factor else 2.0**-5)
    right = (right * 8).bfloat16() if dtype == torch.float32 else right.to(dtype)  # fp32 inputs are divided by 8 first
    left = _signs(max(16, group_size // 16), device)  # of 16 where there is one factor: loaded, not used
    pair = right, (left / len(left)).bfloat16()
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return pair
        torch.cuda.current_stream(device).synchronize()
    _kept_tables[key] = pair
    return pair


@triton.jit
def _probe():
    pass


INTERPRETED = tl.constexpr(not isinstance(_probe, triton.JITFunction))


@triton.jit
def _rounded_to_bf16(v):
    """fp32 -> the nearest bf16, ties to even, as fp32."""
    bits = v.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(v == v, nearest.to(tl.float32, bitcast=True), v)


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        v = _rounded_to_bf16(v)
    return v.to(dtype)


@triton.jit
def operand(v, dtype: tl.constexpr):
    """An operand of a product: v, whose values dtype holds exactly, in dtype."""
    if INTERPRETED and dtype == tl.bfloat16:
        return v.to(tl.float32)
    else:
        return v.to(dtype)


@triton.jit
def _term(v):
    """fp32 -> its leading bf16 term."""
    return operand(_rounded_to_bf16(v) if INTERPRETED else v, tl.bfloat16)


@triton.jit
def loaded_tables(right_ptr, left_ptr, GROUP: tl.constexpr):
    """-> both factors as operands; loaded once, before any loop."""
    n = tl.arange(0, GROUP if GROUP <= 64 else 16)
    r = tl.arange(0, GROUP // 16 if GROUP > 256 else 16)
    right = tl.load(right_ptr + n[:, None] * n.shape[0] + n[None, :])
    left = tl.load(left_ptr + r[:, None] * r.shape[0] + r[None, :])
    return operand(right, right_ptr.dtype.element_ty), operand(left, left_ptr.dtype.element_ty)


@triton.jit
def _times_table(x, h):
    """(R, N) of any float dtype, (N, N) -> fp32 (R, N); three bf16 terms for fp32, else one product."""
    if x.dtype == tl.float32:
        v = x * 0.125  # the first term of the largest fp32 must not round to inf
        high = _term(v)
        rest = v - high.to(tl.float32)
        middle = _term(rest)
        low = _term(rest - middle.to(tl.float32))
        return tl.dot(high, h, tl.dot(middle, h, tl.dot(low, h)))
    else:
        return tl.dot(operand(x, x.dtype), h)


@triton.jit
def _table_times(h, z, TERMS: tl.constexpr):
    """(R, R), fp32 (T, R, 16) -> fp32 (T, R, 16): h times each matrix, of 2 or 3 bf16 terms."""
    h = tl.broadcast_to(h[None, :, :], (z.shape[0], h.shape[0], h.shape[1]))
    high = _term(z)
    rest = z - high.to(tl.float32)
    middle = _term(rest)
    if TERMS == 3:
        y = tl.dot(h, middle, tl.dot(h, _term(rest - middle.to(tl.float32))))
    else:
        y = tl.dot(h, middle)
    return tl.dot(h, high, y)


@triton.jit
def rotated(x, right, left, COLUMNS: tl.constexpr, GROUP: tl.constexpr, TERMS: tl.constexpr):
    """(COLUMNS,) -> fp32 of COLUMNS elements in that order, in 2 or 3 dimensions: the rotation over SHRINK."""
    if GROUP <= 64:
        return _times_table(tl.reshape(x, (COLUMNS // GROUP, GROUP)), right)
    else:
        z = _times_table(tl.reshape(x, (COLUMNS // 16, 16)), right)
        return _table_times(left, tl.reshape(z, (COLUMNS // GROUP, GROUP // 16, 16)), TERMS)
