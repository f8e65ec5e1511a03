"""The rows of a tensor as a kernel reads them: a matrix with any row stride and adjacent columns."""

from math import prod

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """(..., C) -> (M, C), column stride 1: a view of x where one exists, else a copy."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 is not known of no elements
    return rows if rows.stride(1) == 1 else rows.contiguous()


def per_batch(vector: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, int, int]:
    """(B, C) or (C,), shape (B, ..., C) -> the vector with column stride 1, its stride per sample, rows per sample."""
    if vector is None:
        return None, 0, 1
    vector = vector if vector.stride(-1) == 1 else vector.contiguous()
    return (vector, 0, 1) if vector.dim() == 1 else (vector, vector.stride(0), prod(shape[1:-1]))
