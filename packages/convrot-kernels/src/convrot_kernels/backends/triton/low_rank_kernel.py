"""low_rank_down: low = values down^T; low_rank_up: out += gate * alpha * low up^T. Ranks are small, rows are many.

x (M, K), y (M, K2), out (M, N) of any row stride; down (R, K + K2), up (n, r) of any row stride; low (M, R). Sums are
fp32, rounded once to the dtype of x or out. Values are those that rotate_quantize's prologues make of x, so a quantized
layer and the term beside it read the same; they are written out first.
On an H200 (bf16, 4608 rows): K = 3072 down to 16 ranks 12 us, to 64 21 us; up to 21504 columns 125 us in four launches,
to 3072 19 us. Lost there: prologues inside of the product, whose loads then wait for one another (modulate 48 us, GELU
of K = 12288 250 us). Not tried: the term in the epilogue of the product, which would spare reading and writing out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from convrot_kernels.backends.triton.device_functions import operand, rounded
from convrot_kernels.backends.triton.rotate_quantize_kernel import normed, values
from convrot_kernels.backends.triton.rows import as_rows, per_batch
from convrot_kernels.terms import MOST_TERMS, launches

MOST_RANKS = 64  # of a tile: more are walked through
PART_COLUMNS, ROW_COLUMNS = 4096, 16384  # of a program that has a part of a row; of one that needs all for its moments


@triton.jit
def _prologue(
    x_ptr, y_ptr, gain_ptr, shift_ptr, out_ptr,
    K, split, stride_x, stride_y, stride_gain, stride_shift, rows_per_sample, eps,
    PROLOGUE: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS blocks of COLUMNS of a row; all of it where the prologue takes moments."""
    row = tl.program_id(0).to(tl.int64)
    x_row, y_row = x_ptr + row * stride_x, y_ptr + row * stride_y
    gain_row, shift_row = x_row, x_row  # read by modulate alone
    mean, spread, reduced = 0.0, 1.0, 1.0
    if PROLOGUE == "modulate":
        sample = row // rows_per_sample
        gain_row, shift_row = gain_ptr + sample * stride_gain, shift_ptr + sample * stride_shift
        mean, spread, reduced = normed(x_row, K, eps, COLUMNS, STEPS)
    first = tl.program_id(1) * COLUMNS * STEPS
    for step in range(STEPS):
        columns = first + step * COLUMNS + tl.arange(0, COLUMNS)
        v = values(x_row, y_row, gain_row, shift_row, columns, K, split, mean, spread, reduced, PROLOGUE)
        tl.store(out_ptr + row * K + columns, v, mask=columns < K)


@triton.jit
def _low_rank_down(
    x_ptr, down_ptr, low_ptr, M, K, R, stride_x, stride_down,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    sums = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        within = columns[None, :] < K
        x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask=(rows[:, None] < M) & within, other=0.0)
        places = down_ptr + ranks[:, None] * stride_down + columns[None, :]
        down = rounded(tl.load(places, mask=(ranks[:, None] < R) & within, other=0.0).to(tl.float32), dtype)
        sums = tl.dot(operand(x, dtype), tl.trans(operand(down, dtype)), sums, input_precision="ieee")
    places = low_ptr + rows[:, None] * R + ranks[None, :]
    tl.store(places, rounded(sums, dtype), mask=(rows[:, None] < M) & (ranks[None, :] < R))


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
def _low_rank_up(
    out_ptr, low_ptr, up_ptr, up1_ptr, up2_ptr, up3_ptr, gate_ptr, M, R, n, n1, n2, n3,
    column, column1, column2, column3,
    stride_out, stride_low, stride_gate, rows_per_sample, alpha, alpha1, alpha2, alpha3,
    TERMS: tl.constexpr, GATED: tl.constexpr, ALIKE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """TERMS of one rank beside each other: tiles of the first, then of the next."""
    tile = tl.program_id(1)
    first = tl.cdiv(n, COLUMNS)  # tile of the next term
    begin, low_column = 0, 0
    if TERMS > 1:
        second = first + tl.cdiv(n1, COLUMNS)
        if tile >= first:
            up_ptr, n, column, alpha, begin, low_column = up1_ptr, n1, column1, alpha1, first, R
        if TERMS > 2:
            third = second + tl.cdiv(n2, COLUMNS)
            if tile >= second:
                up_ptr, n, column, alpha, begin, low_column = up2_ptr, n2, column2, alpha2, second, 2 * R
            if TERMS > 3:  # noqa: SIM102  # Triton decides this one when it compiles
                if tile >= third:
                    up_ptr, n, column, alpha, begin, low_column = up3_ptr, n3, column3, alpha3, third, 3 * R
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tile - begin) * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, R, RANKS):
        ranks = start + tl.arange(0, RANKS)
        within = ranks[None, :] < R
        places = low_ptr + rows[:, None] * stride_low + (low_column + ranks)[None, :]
        low = tl.load(places, mask=(rows[:, None] < M) & within, other=0.0)
        up = tl.load(up_ptr + columns[:, None] * R + ranks[None, :], mask=(columns[:, None] < n) & within, other=0.0)
        up = rounded(up.to(tl.float32), dtype)
        sums = tl.dot(operand(low, dtype), tl.trans(operand(up, dtype)), sums, input_precision="ieee")
    inside = (rows[:, None] < M) & (columns[None, :] < n)
    sums = sums * alpha
    if GATED:
        gate = gate_ptr + column
        sums = sums * _of_samples(gate, rows, columns, M, n, stride_gate, rows_per_sample, ROWS, ALIKE)
    places = out_ptr + rows[:, None] * stride_out + (column + columns)[None, :]
    out = tl.load(places, mask=inside, other=0.0)
    tl.store(places, rounded(out.to(tl.float32) + sums, dtype), mask=inside)


def _ranks(r: int) -> int:
    """Of a tile: tensor cores take 16 at least."""
    return min(MOST_RANKS, max(16, triton.next_power_of_2(r)))


def _alike(x: Tensor, sample_rows: int, tile: int) -> bool:
    """Whether the rows of every tile are of one sample."""
    return x.dim() < 2 or x.shape[0] == 1 or sample_rows % tile == 0


def _after_prologue(
    x: Tensor, y: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float, gelu: bool
) -> Tensor:
    """(..., K) and (..., K2) -> (M, K + K2), contiguous; x itself as rows where there is no prologue."""
    rows, more = as_rows(x), as_rows(x if y is None else y)
    m, k = rows.shape[0], rows.shape[1] + (0 if y is None else more.shape[1])
    prologue = "gelu" if gelu else "modulate" if scale is not None else "none" if y is None else "cat_gelu"
    if prologue == "none" or m * k == 0:
        return rows if y is None else rows.new_empty(m, k)
    out = torch.empty(m, k, dtype=x.dtype, device=x.device)
    gain, gain_stride, sample_rows = per_batch(scale, x.shape)
    shift, shift_stride, _ = per_batch(shift, x.shape)
    whole = prologue == "modulate"
    columns = min(ROW_COLUMNS if whole else PART_COLUMNS, triton.next_power_of_2(k))
    steps = triton.cdiv(k, columns) if whole else 1
    with torch.cuda.device_of(x):
        _prologue[(m, triton.cdiv(k, columns * steps))](
            rows, more, rows if gain is None else gain, rows if shift is None else shift, out,
            k, rows.shape[1], rows.stride(0), more.stride(0), gain_stride, shift_stride, sample_rows, eps,
            prologue, columns, steps,
            num_warps=min(8, max(1, columns // 1024)), enable_fp_fusion=False,
        )  # fmt: skip
    return out


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
    r = sum(term.shape[0] for term in down)
    low = torch.empty((*x.shape[:-1], r), dtype=x.dtype, device=x.device)
    if low.numel() == 0:
        return low
    rows = _after_prologue(x, y, scale, shift, eps, gelu)
    joint = down[0] if len(down) == 1 else torch.cat(down)
    joint = joint if joint.stride(1) == 1 else joint.contiguous()
    m, k = rows.shape
    tile, ranks = (16 if m <= 1024 else 32), _ranks(r)
    wide = torch.float32 in (x.dtype, joint.dtype)
    block, stages = (64 if x.dtype == torch.float32 else 128), (2 if wide else 4)  # within the 99 KB of sm_86 and sm_89
    with torch.cuda.device_of(x):
        _low_rank_down[(triton.cdiv(m, tile), triton.cdiv(r, ranks))](
            rows, joint, low, m, k, r, rows.stride(0), joint.stride(0), tile, ranks, block,
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
    """Terms beside one another in one launch."""
    try:
        target = out.view(out.shape[:-1].numel(), out.shape[-1])
    except RuntimeError:  # rows lie apart by more than one stride
        packed = out.contiguous()
        low_rank_up(packed, low, up, columns, alpha, gate)
        out.copy_(packed)
        return
    rows = as_rows(low)
    m = target.shape[0]
    gate, gate_stride, sample_rows = per_batch(gate, out.shape)
    tile, wide = (32 if m <= 1024 else 64), (128 if out.dtype != torch.float32 else 64)
    with torch.cuda.device_of(out):
        for first, terms in launches(up, columns, alpha):
            r = terms[0].matrix.shape[1]
            if m * r == 0:
                continue
            matrices, starts, factors = zip(*terms, *[terms[0]] * (MOST_TERMS - len(terms)), strict=True)
            sizes = [matrix.shape[0] for matrix in matrices]
            tiles = sum(triton.cdiv(size, wide) for size in sizes[: len(terms)])
            if tiles:
                _low_rank_up[(triton.cdiv(m, tile), tiles)](
                    target, rows[:, first:], *matrices, matrices[0] if gate is None else gate,
                    m, r, *sizes, *starts, target.stride(0), rows.stride(0), gate_stride, sample_rows, *factors,
                    len(terms), gate is not None, _alike(out, sample_rows, tile), tile, wide, _ranks(r),
                    num_warps=4, num_stages=1, enable_fp_fusion=False,
                )  # fmt: skip
