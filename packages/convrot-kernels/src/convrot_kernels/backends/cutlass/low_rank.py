"""low_rank_down and low_rank_up on the compiled library: low_rank.cu. What it has no code for, Triton or PyTorch do."""

from types import ModuleType

import torch
from torch import Tensor

from convrot_kernels import reference
from convrot_kernels.backends import triton
from convrot_kernels.backends.cutlass import library
from convrot_kernels.backends.cutlass.products import DTYPES, ready
from convrot_kernels.backends.cutlass.quantize import CAT_GELU, GELU, MODULATE, NONE, rows_of, vectors_of
from convrot_kernels.terms import MOST_TERMS, Term, launches

_TYPES = (torch.bfloat16, torch.float16)
_EIGHT = 8  # values of 16 bits that a lane loads at once
_MOST_RANKS, _RANKS = 64, 4  # of a term of low_rank_up; that a lane loads at once


def _otherwise(device: torch.device) -> ModuleType:
    return reference if triton.why_not(device) else triton


def _joined(down: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Those given, or one of them all: of one height and of `dtype`, contiguous and aligned."""
    alike = len(down) <= MOST_TERMS and len({(term.shape[0], term.dtype) for term in down}) == 1
    if not alike or down[0].dtype != dtype:
        down = [torch.cat([term.to(dtype) for term in down])]
    return [ready(term) for term in down]


def _stride(vectors: Tensor | None) -> int:
    """(B, K) -> elements from one sample's to the next; 0 where all rows have the same, or none."""
    return 0 if vectors is None or vectors.shape[0] == 1 else vectors.stride(0)


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
    seam, k = x.shape[-1], x.shape[-1] + (0 if y is None else y.shape[-1])
    if x.dtype not in _TYPES or seam % _EIGHT or k % _EIGHT:
        # sums of fp32 values are no tensor core's
        slower: Tensor = _otherwise(x.device).low_rank_down(x, down, y, scale, shift, eps, gelu=gelu)
        return slower
    ranks = sum(term.shape[0] for term in down)
    low = x.new_empty((*x.shape[:-1], ranks))
    if low.numel() == 0:
        return low
    if k == 0:
        return low.zero_()
    _, ours = library.of(x.device)
    with torch.cuda.device(x.device):
        rows, more = rows_of(x, _EIGHT), None if y is None else rows_of(y, _EIGHT)
        gain, offset = (None, None) if scale is None or shift is None else vectors_of(scale, shift, _EIGHT)
        samples = 1 if gain is None else gain.shape[0]
        matrices = _joined([term for term in down if term.shape[0]], x.dtype)
        prologue = GELU if gelu else CAT_GELU if y is not None else NONE if gain is None else MODULATE
        ours.call(
            "convrot_low_rank_down",
            *(rows.data_ptr(), rows.stride(0)),
            *((None, 0) if more is None else (more.data_ptr(), more.stride(0))),
            seam,
            *((None, 0) if gain is None else (gain.data_ptr(), DTYPES[gain.dtype])),
            *((None, 0) if offset is None else (offset.data_ptr(), DTYPES[offset.dtype])),
            *(_stride(gain), rows.shape[0] // samples, eps),
            *(matrix.data_ptr() for matrix in matrices),
            *(None,) * (MOST_TERMS - len(matrices)),
            *(len(matrices), matrices[0].shape[0], low.data_ptr(), rows.shape[0], k, prologue, DTYPES[x.dtype]),
            torch.cuda.current_stream().cuda_stream,
        )
    return low


def _aligned(tensor: Tensor, values: int) -> bool:
    """Whether every row begins where `values` can be loaded at once."""
    whole = tensor.data_ptr() % (values * tensor.element_size()) == 0
    return whole and (tensor.shape[0] == 1 or tensor.stride(0) % values == 0)


def _fits(target: Tensor, low: Tensor, first: int, terms: list[Term]) -> bool:
    """Whether one launch of the kernel adds these terms."""
    r = terms[0].matrix.shape[1]
    return (
        terms[0].matrix.dtype == target.dtype
        and 0 < r <= _MOST_RANKS
        and r % _RANKS == 0
        and _aligned(low[:, first:], _RANKS)
        and all(term.matrix.shape[0] % _EIGHT == term.column % _EIGHT == 0 for term in terms)
        and all(term.matrix.shape[0] and _aligned(term.matrix, _RANKS) for term in terms)
    )


def low_rank_up(
    out: Tensor,
    low: Tensor,
    up: list[Tensor],
    columns: list[int],
    alpha: list[float],
    gate: Tensor | None = None,
) -> None:
    """Terms beside one another in one launch."""
    if not low.numel() or not out.numel():
        return
    otherwise = _otherwise(out.device).low_rank_up
    if out.dtype not in _TYPES:
        otherwise(out, low, up, columns, alpha, gate)
        return
    try:
        target = out.view(out.shape[:-1].numel(), out.shape[-1])
    except RuntimeError:  # rows lie apart by more than one stride
        target = None
    if target is None or not _aligned(target, _EIGHT):
        if out.shape[-1] % _EIGHT:
            otherwise(out, low, up, columns, alpha, gate)
            return
        packed = out.clone(memory_format=torch.contiguous_format)
        low_rank_up(packed, low, up, columns, alpha, gate)
        out.copy_(packed)
        return
    rows = rows_of(low, _RANKS)
    _, ours = library.of(out.device)
    with torch.cuda.device(out.device):
        gates = None if gate is None else vectors_of(gate, gate, _EIGHT)[0]
        samples = 1 if gates is None else gates.shape[0]
        for first, terms in launches(up, columns, alpha):
            if not _fits(target, rows, first, terms):
                part = low[..., first : first + sum(term.matrix.shape[1] for term in terms)]
                otherwise(out, part, *(list(values) for values in zip(*terms, strict=True)), gate)
                continue
            none = MOST_TERMS - len(terms)
            ours.call(
                "convrot_low_rank_up",
                *(target.data_ptr(), target.stride(0), rows[:, first:].data_ptr(), rows.stride(0)),
                *(*(term.matrix.data_ptr() for term in terms), *(None,) * none),
                *(*(term.matrix.shape[0] for term in terms), *(0,) * none),
                *(*(term.column for term in terms), *(0,) * none),
                *(*(term.alpha for term in terms), *(0.0,) * none),
                *(len(terms), terms[0].matrix.shape[1]),
                *((None, 0) if gates is None else (gates.data_ptr(), DTYPES[gates.dtype])),
                _stride(gates),
                *(target.shape[0] // samples, target.shape[0], DTYPES[out.dtype]),
                torch.cuda.current_stream().cuda_stream,
            )
