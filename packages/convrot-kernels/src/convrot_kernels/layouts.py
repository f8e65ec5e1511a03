"""Resident orders of a weight's codes, by name. Files, state dicts and conversions are always row_major.

A backend that wants another order adds one line here: two functions that undo each other bit for bit.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """Both ways between row-major codes, int8 (N, K) or packed uint8 (N, K/2), and the resident order."""

    prepare: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor]


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


LAYOUTS: dict[str, Layout] = {"row_major": Layout(_as_it_is, _as_it_is)}
