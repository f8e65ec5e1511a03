"""A layer's low-rank branch: the leading singular vectors of its weight, kept in 16 bits beside the codes of the rest.

W = up @ down + R, and only R is rotated and quantized. What the branch holds multiplies activations of 16 bits, so that
errors of weights and of activations shrink as R does. No data is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BRANCH_LEAVES = ("low_rank_down", "low_rank_up")  # a layer's buffers, in the order of Branch
ITERATIONS, OVERSAMPLING = 10, 8


class Branch(NamedTuple):
    """down (r, K), up (N, r), in the dtype that the layer computes in: up (down x) is added to the product."""

    down: Tensor
    up: Tensor

    def rest_of(self, weight: Tensor) -> Tensor:
        """(N, K) -> fp32 (N, K): what the branch, as it is rounded, leaves to be quantized."""
        return weight.float() - self.up.float() @ self.down.float()


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """fp32 (N, K) -> up (N, r), down (r, K): up @ down is nearly the nearest matrix of that rank.

    By subspace iteration (Halko et al. 2011): seconds less than a whole decomposition at N = 9216, and noise, whose
    singular values hardly differ, is where it holds a percent less.
    """
    wide = min(matrix.shape[0], matrix.shape[1], 2 * rank + OVERSAMPLING)
    generator = torch.Generator("cpu").manual_seed(0)  # whatever torch's default device and dtype are
    start = torch.randn(matrix.shape[1], wide, generator=generator, device="cpu", dtype=torch.float32).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return (basis @ left[:, :rank]) * values[:rank], right[:rank]


def branch_of(weight: Tensor, rank: int) -> Branch:
    """(N, K) fp16, bf16 or fp32, finite -> its branch in that dtype.

    The singular values are shared equally between the two: both keep far from the ends of fp16.
    """
    values, tiny = weight.float(), torch.finfo(torch.float32).tiny
    unit = values.abs().amax().clamp_min(tiny)  # squares of what bf16 and fp32 hold may not fit fp32
    up, down = leading(values / unit, rank)
    root = up.norm(dim=0).sqrt().clamp_min(tiny)
    down, up = down * root[:, None] * unit.sqrt(), up / root * unit.sqrt()
    # row-major as every file has it: products of another order round otherwise
    return Branch(down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous())
