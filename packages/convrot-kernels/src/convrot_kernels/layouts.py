"""Resident orders of a weight's codes, by name. Files, state dicts and conversions are always row_major.

A backend that wants another order adds one line here: two functions that undo each other bit for bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SPAN = 128  # columns that halves128 keeps together: one step of a matrix product


class Layout(NamedTuple):
    """Both ways between row-major codes, int8 (N, K) or packed uint8 (N, K/2), and the resident order."""

    prepare: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor]


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _into_halves(weight: Tensor) -> Tensor:
    """Packed, K a multiple of 128: byte j of 64 holds the columns j (low nibble) and 64 + j. Else as it is."""
    if weight.dtype != torch.uint8 or 2 * weight.shape[1] % SPAN:
        return weight
    spans = weight.reshape(weight.shape[0], -1, SPAN // 2)
    first, second = torch.stack((spans & 15, spans >> 4), dim=-1).flatten(-2).chunk(2, dim=-1)
    return (first | second << 4).view(weight.shape)


def _from_halves(weight: Tensor) -> Tensor:
    if weight.dtype != torch.uint8 or 2 * weight.shape[1] % SPAN:
        return weight
    spans = weight.reshape(weight.shape[0], -1, SPAN // 2)
    codes = torch.cat((spans & 15, spans >> 4), dim=-1).unflatten(-1, (-1, 2))
    return (codes[..., 0] | codes[..., 1] << 4).view(weight.shape)


def _in_blocks(weight: Tensor) -> bool:
    return weight.dtype == torch.uint8 and weight.shape[0] % 16 == 0 and 2 * weight.shape[1] % 32 == 0


def _into_blocks(weight: Tensor) -> Tensor:
    """Packed, N a multiple of 16 and K of 32: what a thread of a Hopper GEMM needs lies together. Else as it is.

    Blocks of 16 x 32, K first, so that weights stacked along N are stacked in memory too.
    In a block, nibble 64 (n % 8) + 16 (k / 4 % 4) + 8 (k / 16) + 2 (k % 4) + n / 8.
    """
    if not _in_blocks(weight):
        return weight
    n, k = weight.shape[0], 2 * weight.shape[1]
    nibbles = torch.stack((weight & 15, weight >> 4), dim=-1).view(n // 16, 2, 8, k // 32, 2, 4, 4)
    pairs = nibbles.permute(0, 3, 2, 5, 4, 6, 1).reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).view(weight.shape)


def _from_blocks(weight: Tensor) -> Tensor:
    if not _in_blocks(weight):
        return weight
    n, k = weight.shape[0], 2 * weight.shape[1]
    nibbles = torch.stack((weight & 15, weight >> 4), dim=-1).view(n // 16, k // 32, 8, 4, 2, 4, 2)
    pairs = nibbles.permute(0, 6, 2, 1, 4, 3, 5).reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).view(weight.shape)


LAYOUTS: dict[str, Layout] = {
    "row_major": Layout(_as_it_is, _as_it_is),
    "halves128": Layout(_into_halves, _from_halves),
    "blocks16x32": Layout(_into_blocks, _from_blocks),
}
