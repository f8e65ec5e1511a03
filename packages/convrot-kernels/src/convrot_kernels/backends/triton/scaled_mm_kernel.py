"""scaled_mm: out = (acc * a_scale) * b_scale + bias [; residual + gate * that], acc = a b^T exact in int32.

a (M, K) int8 codes, (M, K/2) packed codes or (M, K) values; b (N, K) int8 codes or (N, K/2) packed codes, row_major or
halves128; any row strides. Every epilogue step is rounded to fp32 (no FMA), then once to the dtype of out (M, N).

The accumulator is the transpose (BLOCK_N, BLOCK_M): weights are the left operand, which tensor cores take from
registers, where nibbles are widened; activations go to shared memory as they are. A nibble becomes 16 times its value
(`byte << 4` and `byte & 0xF0`: no sign extension), and a power of two comes out of the sum exactly.
How the columns of a step meet:
  halves   b in halves128, a int8 or values: low nibbles with the first half of the columns, high ones with the second
  pairs    both packed row-major: low nibbles with low, high with high
  wide     the rest: row-major nibbles are interleaved in registers first; int8 b needs nothing
Values (W4A16) are multiplied in their own dtype with fp32 sums, fp32 ones without tensor cores ("ieee").

Beyond 1024 rows on Hopper and later, aligned operands travel by tensor descriptors (TMA).
A prototype with them ran at 1.19 to 1.39 times torch.matmul in bf16 at M = 4608 on an H200. Inline assembly widens four
nibbles an instruction there; the portable way is for the interpreter. The table of blocks is not tuned yet.
Not tried: a persistent grid, warp specialization, split K for M = 1, e4m3 products where a GPU has no int8 ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from convrot_kernels.backends.triton.device_functions import INTERPRETED, operand, rounded
from convrot_kernels.backends.triton.rows import as_rows, per_batch
from convrot_kernels.layouts import LAYOUTS, SPAN
from convrot_kernels.reference import unpack_int4

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

BLOCK_K = SPAN  # a step takes whole blocks of halves128
DESCRIPTOR_ROWS = 1024  # encoding two descriptors costs the host 20 us, more than they save below
MOST_K = 131071  # of 128 * 128 each, also when nibbles count 16 times
TILE_ROWS = 8  # tiles that share columns of b run together, so many rows of tiles at a time


class Blocks(NamedTuple):
    """Rows of a and of b in a tile, warps, stages of the pipeline."""

    m: int
    n: int
    warps: int
    stages: int


def pick_blocks(m: int, n: int, k: int, value_bytes: int = 1) -> Blocks:
    """Tiles grow with M; `value_bytes`, of an element of a, bounds them: the stages must fit 99 KB of shared memory."""
    if m <= 16:
        return Blocks(16, 64 if n >= 8192 else 32, 4, 4 if k >= 1024 and value_bytes < 4 else 2)
    if m <= 64 or value_bytes == 4:
        return Blocks(32 if value_bytes == 4 else 64, 64, 4, 3)
    if m <= 256 or value_bytes == 2:
        return Blocks(64, 128, 4, 3)
    return Blocks(128, 128, 8, 3)


def uses_descriptors(a: Tensor, b: Tensor, mode: str) -> bool:
    """Whether a and b travel by tensor descriptors (Hopper's TMA): many rows, aligned, and a not packed."""
    if TensorDescriptor is None or INTERPRETED or a.dtype != torch.int8 or a.shape[0] < DESCRIPTOR_ROWS:
        return False
    if any(t.data_ptr() % 16 or t.stride(0) % 16 or t.stride(0) < t.shape[1] for t in (a, b)):
        return False
    return mode != "pairs" and torch.cuda.get_device_capability(a.device) >= (9, 0)


@triton.jit
def _widened(packed):
    """int8, two codes each -> int8 and int8: 16 times the low codes, 16 times the high ones."""
    if INTERPRETED:
        low, high = packed << 4, packed & -16
    else:  # one result a statement: Triton 3.2 fails on two
        low = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $1, 4; and.b32 $0, $0, 0xF0F0F0F0; }", "=r,r", [packed], tl.int8, is_pure=True, pack=4
        )
        high = tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], tl.int8, is_pure=True, pack=4)
    return low, high


@triton.jit
def _codes_as(codes, dtype: tl.constexpr, SIXTEENTH: tl.constexpr):
    """int8 -> the dtype of a; for values the factor 16 is taken out first: it could overflow their sum."""
    if dtype == tl.int8:
        return codes
    else:
        if SIXTEENTH:
            codes = codes >> 4
        return operand(codes, dtype)


@triton.jit
def _multiply(w, x, acc):
    """acc (BLOCK_N, BLOCK_M) + w (BLOCK_N, C) x^T, x (BLOCK_M, C)."""
    if x.dtype == tl.int8:
        return tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
    else:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_ROWS: tl.constexpr):
    """-> the tile's place along M and N: TILE_ROWS rows of tiles at a time, column after column."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (TILE_ROWS * columns) * TILE_ROWS
    height = tl.minimum(rows - first, TILE_ROWS)
    inside = pid % (TILE_ROWS * columns)
    return first + inside % height, inside // height


@triton.jit
def _epilogue(
    y, out_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, gate_ptr, residual_ptr, m, n, M, N,
    stride_out, stride_gate, stride_residual, rows_per_sample,
):  # fmt: skip
    """Scales, bias, gate and residual over fp32 (BLOCK_N, BLOCK_M), one step after the other."""
    if a_scale_ptr is not None:
        y = y * tl.load(a_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    y = y * tl.load(b_scale_ptr + n, mask=n < N, other=0.0)[:, None]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    inside = (m < M)[None, :] & (n < N)[:, None]
    row = m.to(tl.int64)[None, :]
    if gate_ptr is not None:
        sample = (m // rows_per_sample).to(tl.int64)[None, :]
        gate = tl.load(gate_ptr + sample * stride_gate + n[:, None], mask=inside, other=0.0)
        residual = tl.load(residual_ptr + row * stride_residual + n[:, None], mask=inside, other=0.0)
        y = y * gate.to(tl.float32) + residual.to(tl.float32)
    tl.store(out_ptr + row * stride_out + n[:, None], rounded(y, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scaled_mm(
    out_ptr, a, b, a_scale_ptr, b_scale_ptr, bias_ptr, gate_ptr, residual_ptr,
    M, N, K, stride_out, stride_a, stride_b, stride_gate, stride_residual, rows_per_sample,
    VALUES: tl.constexpr, MODE: tl.constexpr, B_PACKED: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_K // 2
    A_WIDTH: tl.constexpr = BLOCK_K if MODE == "wide" else HALF  # elements of a row of a in one load
    B_WIDTH: tl.constexpr = HALF if B_PACKED else BLOCK_K
    tile_m, tile_n = _tile(M, N, BLOCK_M, BLOCK_N, TILE_ROWS)
    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_places, b_places = tl.arange(0, A_WIDTH)[None, :], tl.arange(0, B_WIDTH)[None, :]
    if not DESCRIPTORS:  # rows beyond the edge repeat the last one; their results are not stored
        a_tile = a + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_a + a_places
        b_tile = b + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_b + b_places
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32 if VALUES else tl.int32)

    for k in range(0, K, BLOCK_K):
        # operands
        if DESCRIPTORS:
            w = b.load([tile_n * BLOCK_N, k // 2 if B_PACKED else k])
            x = a.load([tile_m * BLOCK_M, k])
            if MODE == "halves":
                second = a.load([tile_m * BLOCK_M, k + HALF])
        elif EVEN_K:
            w, x = tl.load(b_tile), tl.load(a_tile)
            if MODE == "halves":
                second = tl.load(a_tile + HALF)
        else:
            w = tl.load(b_tile, mask=b_places < ((K - k) // 2 if B_PACKED else K - k), other=0)
            x = tl.load(a_tile, mask=a_places < ((K - k) // 2 if MODE == "pairs" else K - k), other=0)
        # products
        if MODE == "halves":
            low, high = _widened(w)
            acc = _multiply(_codes_as(low, x.dtype, True), operand(x, x.dtype), acc)
            acc = _multiply(_codes_as(high, x.dtype, True), operand(second, x.dtype), acc)
        elif MODE == "pairs":
            low, high = _widened(w)
            x_low, x_high = _widened(x)
            acc = _multiply(low, x_low, acc)
            acc = _multiply(high, x_high, acc)
        else:
            if B_PACKED:
                low, high = _widened(w)
                w = tl.interleave(low, high)
            acc = _multiply(_codes_as(w, x.dtype, B_PACKED), operand(x, x.dtype), acc)
        if not DESCRIPTORS:
            a_tile += HALF if MODE == "pairs" else BLOCK_K
            b_tile += B_WIDTH

    y = acc.to(tl.float32)
    if MODE == "pairs":
        y = y * 0.00390625
    elif B_PACKED and not VALUES:
        y = y * 0.0625
    _epilogue(
        y, out_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, gate_ptr, residual_ptr, m, n, M, N,
        stride_out, stride_gate, stride_residual, rows_per_sample,
    )  # fmt: skip


def _operands(a: Tensor, b: Tensor, b_layout: str) -> tuple[Tensor, Tensor, str]:
    """-> a (M, C) and b (N, C) as one of the three modes reads them, and the mode. Rare pairs are converted first."""
    a = as_rows(a)
    if b_layout not in ("row_major", "halves128"):
        b, b_layout = LAYOUTS[b_layout].restore(b), "row_major"
    b = as_rows(b)
    halves = b.dtype == torch.uint8 and b_layout == "halves128" and 2 * b.shape[1] % SPAN == 0
    if a.dtype == torch.uint8:
        if b.dtype == torch.uint8 and not halves:
            return a.view(torch.int8), b.view(torch.int8), "pairs"
        a = unpack_int4(a)
    return a, b, "halves" if halves else "wide"


def _launch(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    b_layout: str,
) -> None:
    """Into out (M, N), column stride 1."""
    m, n = out.shape
    if m == 0 or n == 0:
        return
    gate, gate_stride, sample_rows = per_batch(gate, () if residual is None else residual.shape)
    residual = None if residual is None else as_rows(residual)
    values, packed = a.is_floating_point(), b.dtype == torch.uint8
    a, b, mode = _operands(a, b, b_layout)
    b = b.view(torch.int8)
    k = a.shape[1] * (2 if mode == "pairs" else 1)
    assert values or k <= MOST_K, f"int32 holds sums of at most {MOST_K} products, got K={k}"
    blocks = pick_blocks(m, n, k, a.element_size())
    strides = (out.stride(0), a.stride(0), b.stride(0), gate_stride, 0 if residual is None else residual.stride(0))
    descriptors = uses_descriptors(a, b, mode)
    left, right = a, b
    if descriptors:
        left = TensorDescriptor.from_tensor(a, [blocks.m, BLOCK_K if mode == "wide" else BLOCK_K // 2])
        right = TensorDescriptor.from_tensor(b, [blocks.n, BLOCK_K // 2 if packed else BLOCK_K])
    with torch.cuda.device_of(out):
        _scaled_mm[(triton.cdiv(m, blocks.m) * triton.cdiv(n, blocks.n),)](
            out, left, right, None if a_scale is None else a_scale.reshape(-1).contiguous(), b_scale.contiguous(),
            None if bias is None else bias.contiguous(), gate, residual, m, n, k, *strides, sample_rows,
            values, mode, packed, descriptors, k % BLOCK_K == 0, blocks.m, blocks.n, BLOCK_K, TILE_ROWS,
            num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=False,
        )  # fmt: skip


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    b_layout: str = "row_major",
) -> Tensor:
    """(..., K) x (N, K) -> (..., N), rounded once to out_dtype."""
    assert b_scale is not None, "checks.py requires b_scale"
    dtype = out_dtype or (a.dtype if a.is_floating_point() else torch.bfloat16)
    out = torch.empty((*a.shape[:-1], b.shape[0]), dtype=dtype, device=a.device)
    _launch(out.view(out.shape[:-1].numel(), b.shape[0]), a, b, a_scale, b_scale, bias, b_layout=b_layout)
    return out


def scaled_mm_out(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    b_layout: str = "row_major",
) -> None:
    """scaled_mm written into out (..., N); rows of an `out` that no one stride reaches are written by a copy."""
    assert b_scale is not None, "checks.py requires b_scale"
    try:
        rows = out.view(out.shape[:-1].numel(), out.shape[-1])
    except RuntimeError:  # rows lie apart by more than one stride
        out.copy_(scaled_mm(a, b, a_scale, b_scale, bias, out.dtype, b_layout=b_layout))
    else:
        _launch(rows, a, b, a_scale, b_scale, bias, b_layout=b_layout)


def scaled_mm_cat(
    a: Tensor,
    b: Sequence[Tensor],
    a_scale: Tensor | None,
    b_scale: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    out_dtype: torch.dtype | None = None,
    *,
    b_layout: str = "row_major",
) -> Tensor:
    """(..., K) x (N1, K), (N2, K), ... -> (..., N1 + N2 + ...): one launch each, into its columns."""
    biases: Sequence[Tensor | None] = bias or [None] * len(b)
    dtype = out_dtype or (a.dtype if a.is_floating_point() else torch.bfloat16)
    widths = [weight.shape[0] for weight in b]
    out = torch.empty((*a.shape[:-1], sum(widths)), dtype=dtype, device=a.device)
    columns = out.view(out.shape[:-1].numel(), out.shape[-1]).split(widths, dim=1)
    for part, weight, scale, vector in zip(columns, b, b_scale, biases, strict=True):
        _launch(part, a, weight, a_scale, scale, vector, b_layout=b_layout)
    return out


def scaled_mm_gate_residual(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    residual: Tensor,
    *,
    b_layout: str = "row_major",
) -> Tensor:
    """residual + gate * (scaled_mm before its last rounding), in fp32, rounded once to residual.dtype."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    rows = out.view(out.shape[:-1].numel(), out.shape[-1])
    _launch(rows, a, b, a_scale, b_scale, bias, gate, residual, b_layout=b_layout)
    return out
