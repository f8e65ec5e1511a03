"""The terms of low_rank_up as the kernels of both GPU backends take them: those that one launch can add."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

MOST_TERMS = 4


class Term(NamedTuple):
    """up (n, r), contiguous; where in out its columns begin; its alpha."""

    matrix: Tensor
    column: int
    alpha: float


def launches(up: list[Tensor], columns: list[int], alpha: list[float]) -> Iterator[tuple[int, list[Term]]]:
    """What to launch in turn: the first column of low, and up to MOST_TERMS terms.

    Those of a launch have one rank and one dtype, and none of their columns meet.
    """
    first, end, found = 0, 0, list[Term]()
    for term in map(Term, (matrix.contiguous() for matrix in up), columns, alpha):
        if found:
            last = found[-1]
            alike = term.matrix.shape[1] == last.matrix.shape[1] and term.matrix.dtype == last.matrix.dtype
            if not alike or len(found) == MOST_TERMS or term.column < last.column + last.matrix.shape[0]:
                yield first, found
                first, found = end, []
        found.append(term)
        end += term.matrix.shape[1]
    if found:
        yield first, found
