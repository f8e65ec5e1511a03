"""low_rank_down: low = values(x) down^T; low_rank_up: out += gate * alpha * low up^T. Ranks are small, rows are many.

x (M, K), y (M, K2), out (M, N) of any row stride; down (r, K + K2), up (n, r) of any row stride; low (M, r). Sums are
fp32, rounded once to the dtype of x or out. Values are those that rotate_quantize's prologues make of x, so a quantized
layer and the term beside it read the same. Both are bound by memory: x is read once, out read and written once.
LayerNorm takes mean and variance of a row chunk by chunk (Chan, Golub and LeVeque 1983), then reads it again from L2.
Not tried: the term in the epilogue of the product, which would spare reading and writing out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from convrot_kernels.backends.triton.device_functions import operand, rounded
from convrot_kernels.backends.triton.rotate_quantize_kernel import INF, TINY, gelu_tanh
from convrot_kernels.backends.triton.rows import as_rows, per_batch

MOST_RANKS = 64  # of a tile: more are walked through


@triton.jit
def _chunk(x_ptr, rows, start, M, K, stride, BLOCK: tl.constexpr):
    """-> (ROWS, BLOCK) columns from start on, 0 beyond M and K, and where they are inside of K."""
    columns = start + tl.arange(0, BLOCK)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    return tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _of_samples(vector_ptr, rows, columns, M, N, stride, rows_per_sample, ROWS: tl.constexpr, ALIKE: tl.constexpr):
    """-> fp32 (1 or ROWS, columns): what belongs to each row's sample; one row where they are of one sample."""
    if ALIKE:
        sample = (tl.program_id(0) * ROWS).to(tl.int64) // rows_per_sample
        vector = tl.load(vector_ptr + sample * stride + columns, mask=columns < N, other=0.0)[None, :]
    else:
        samples = tl.minimum(rows, M - 1) // rows_per_sample
        places = vector_ptr + samples[:, None] * stride + columns[None, :]
        vector = tl.load(places, mask=(columns < N)[None, :], other=0.0)
    return vector.to(tl.float32)


@triton.jit
def _moments(x_ptr, rows, M, K, stride, reduced, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """-> mean and variance (ROWS,) of the rows times `reduced` (ROWS,)."""
    mean = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, K, BLOCK):
        x = _chunk(x_ptr, rows, start, M, K, stride, BLOCK).to(tl.float32) * reduced[:, None]
        inside = (start + tl.arange(0, BLOCK) < K)[None, :]
        count = tl.minimum(K - start, BLOCK).to(tl.float32)
        here = tl.sum(x, axis=1) / count
        centred = tl.where(inside, x - here[:, None], 0.0)
        apart = here - mean
        share = count / (start + count)
        mean += apart * share
        squares += tl.sum(centred * centred, axis=1) + apart * apart * share * start
    return mean, squares / K


@triton.jit
def _times(x, down_ptr, ranks, start, R, K, stride, sums, BLOCK: tl.constexpr):
    """sums (ROWS, RANKS) + x (ROWS, BLOCK) times columns start to start + BLOCK of down."""
    columns = start + tl.arange(0, BLOCK)
    inside = (ranks[:, None] < R) & (columns[None, :] < K)
    down = tl.load(down_ptr + ranks[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    down = rounded(down.to(tl.float32), x.dtype)  # an adapter may be held in fp32
    return tl.dot(operand(x, x.dtype), tl.trans(operand(down, x.dtype)), sums, input_precision="ieee")


@triton.jit
def _low_rank_down(
    x_ptr, y_ptr, gain_ptr, shift_ptr, down_ptr, low_ptr,
    M, K, K2, R, stride_x, stride_y, stride_gain, stride_shift, stride_down, rows_per_sample, eps,
    PROLOGUE: tl.constexpr, ALIKE: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    sums = tl.zeros((ROWS, RANKS), tl.float32)

    mean = tl.zeros((ROWS,), tl.float32)
    spread, reduced = mean, mean + 1.0
    if PROLOGUE == "modulate":
        mean, variance = _moments(x_ptr, rows, M, K, stride_x, reduced, ROWS, BLOCK)
        if tl.max(tl.where(variance < INF, 0, 1)) > 0:  # squares that leave fp32; NaN is not less
            reduced = tl.where(variance < INF, 1.0, TINY)
            mean, variance = _moments(x_ptr, rows, M, K, stride_x, reduced, ROWS, BLOCK)
        spread = tl.rsqrt(variance + eps * reduced)

    for start in range(0, K, BLOCK):
        x = _chunk(x_ptr, rows, start, M, K, stride_x, BLOCK)
        if PROLOGUE == "gelu":
            x = rounded(gelu_tanh(x.to(tl.float32)), dtype)
        if PROLOGUE == "modulate":
            columns = start + tl.arange(0, BLOCK)
            gain = _of_samples(gain_ptr, rows, columns, M, K, stride_gain, rows_per_sample, ROWS, ALIKE)
            shift = _of_samples(shift_ptr, rows, columns, M, K, stride_shift, rows_per_sample, ROWS, ALIKE)
            normal = (x.to(tl.float32) * reduced[:, None] - mean[:, None]) * spread[:, None]
            x = rounded(normal * (1.0 + gain) + shift, dtype)
        sums = _times(x, down_ptr, ranks, start, R, K, stride_down, sums, BLOCK)
    if PROLOGUE == "cat_gelu":
        for start in range(0, K2, BLOCK):
            y = _chunk(y_ptr, rows, start, M, K2, stride_y, BLOCK)
            y = rounded(gelu_tanh(y.to(tl.float32)), dtype)
            sums = _times(y, down_ptr + K, ranks, start, R, K2, stride_down, sums, BLOCK)
    places = low_ptr + rows[:, None] * R + ranks[None, :]
    tl.store(places, rounded(sums, dtype), mask=(rows[:, None] < M) & (ranks[None, :] < R))


@triton.jit
def _low_rank_up(
    out_ptr, low_ptr, up_ptr, gate_ptr, M, N, R, stride_out, stride_low, stride_up, stride_gate, rows_per_sample, alpha,
    GATED: tl.constexpr, ALIKE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, R, RANKS):
        ranks = start + tl.arange(0, RANKS)
        within = ranks[None, :] < R
        low = tl.load(
            low_ptr + rows[:, None] * stride_low + ranks[None, :], mask=(rows[:, None] < M) & within, other=0.0
        )
        up = tl.load(
            up_ptr + columns[:, None] * stride_up + ranks[None, :], mask=(columns[:, None] < N) & within, other=0.0
        )
        up = rounded(up.to(tl.float32), dtype)
        sums = tl.dot(operand(low, dtype), tl.trans(operand(up, dtype)), sums, input_precision="ieee")
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    sums = sums * alpha
    if GATED:
        sums = sums * _of_samples(gate_ptr, rows, columns, M, N, stride_gate, rows_per_sample, ROWS, ALIKE)
    places = out_ptr + rows[:, None] * stride_out + columns[None, :]
    out = tl.load(places, mask=inside, other=0.0)
    tl.store(places, rounded(out.to(tl.float32) + sums, dtype), mask=inside)


def _ranks(r: int) -> int:
    """Of a tile: tensor cores take 16 at least."""
    return min(MOST_RANKS, max(16, triton.next_power_of_2(r)))


def _alike(x: Tensor, sample_rows: int, tile: int) -> bool:
    """Whether the rows of every tile are of one sample."""
    return x.dim() < 2 or x.shape[0] == 1 or sample_rows % tile == 0


def low_rank_down(
    x: Tensor,
    down: list[Tensor],
    y: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    *,
    gelu: bool = False,
) -> Tensor:
    """(..., K) -> (..., R)."""
    rows, more = as_rows(x), as_rows(x if y is None else y)
    joint = down[0] if len(down) == 1 else torch.cat(down) if down else x.new_empty(0, 1)
    joint = joint if joint.stride(1) == 1 else joint.contiguous()
    (m, k), r = rows.shape, joint.shape[0]
    low = torch.empty((*x.shape[:-1], r), dtype=x.dtype, device=x.device)
    if m == 0 or r == 0:
        return low
    gain, gain_stride, sample_rows = per_batch(scale, x.shape)
    shift, shift_stride, _ = per_batch(shift, x.shape)
    prologue = "gelu" if gelu else "modulate" if scale is not None else "none" if y is None else "cat_gelu"
    tile, ranks = (16 if m <= 1024 else 32), _ranks(r)
    wide = torch.float32 in (x.dtype, joint.dtype)
    block, stages = (64 if x.dtype == torch.float32 else 128), (2 if wide else 4)  # within the 99 KB of sm_86 and sm_89
    with torch.cuda.device_of(x):
        _low_rank_down[(triton.cdiv(m, tile), triton.cdiv(r, ranks))](
            rows, more, rows if gain is None else gain, rows if shift is None else shift, joint, low,
            m, k, more.shape[1], r, rows.stride(0), more.stride(0), gain_stride, shift_stride, joint.stride(0),
            sample_rows, eps, prologue, _alike(x, sample_rows, tile), tile, ranks, block,
            num_warps=4, num_stages=stages, enable_fp_fusion=False,
        )  # fmt: skip
    return low


def low_rank_up(
    out: Tensor,
    low: Tensor,
    up: list[Tensor],
    columns: list[int],
    alpha: list[float],
    gate: Tensor | None = None,
) -> None:
    """A launch for each term."""
    try:
        target = out.view(out.shape[:-1].numel(), out.shape[-1])
    except RuntimeError:  # rows lie apart by more than one stride
        packed = out.contiguous()
        low_rank_up(packed, low, up, columns, alpha, gate)
        out.copy_(packed)
        return
    rows = as_rows(low)
    m, first = target.shape[0], 0
    gate, gate_stride, sample_rows = per_batch(gate, out.shape)
    with torch.cuda.device_of(out):
        for term, column, factor in zip(up, columns, alpha, strict=True):
            n, r = term.shape
            term = term if term.stride(1) == 1 else term.contiguous()
            if m * n * r:
                tile, ranks = (32 if m <= 1024 else 64), _ranks(r)
                wide = 128 if out.dtype != torch.float32 else 64
                _low_rank_up[(triton.cdiv(m, tile), triton.cdiv(n, wide))](
                    target[:, column:], rows[:, first:], term, term if gate is None else gate[..., column:],
                    m, n, r, target.stride(0), rows.stride(0), term.stride(0), gate_stride, sample_rows, factor,
                    gate is not None, _alike(out, sample_rows, tile), tile, wide, ranks,
                    num_warps=4, num_stages=1, enable_fp_fusion=False,
                )  # fmt: skip
            first += r
