"""GPTQ (Frantar et al. 2022): each column's rounding error is made up for by the columns after it.

Codes, scales and kernels are those of any other rounding; what is needed are rows that the layer reads. In the rotated
basis no column stands out, so columns are taken in their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # columns whose errors reach the rest of the weight in one product
DAMPING = 0.01  # of the mean square of an input, added to every one


def gptq_codes(weight: Tensor, scale: Tensor, inputs: Tensor, qmax: int) -> Tensor:
    """fp32 (N, K), scale (N, 1) or (N, K), inputs (C, K) -> int8 (N, K), -qmax to qmax."""
    inverse = _inverse_factor(inputs.to(weight.device))
    scale = scale.expand_as(weight)
    left, codes = weight.clone(), torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        errors = torch.empty(weight.shape[0], stop - start, device=weight.device)
        for i in range(start, stop):
            code = (left[:, i] / scale[:, i]).round_().clamp_(-qmax, qmax)
            codes[:, i] = code
            errors[:, i - start] = (left[:, i] - code * scale[:, i]) / inverse[i, i]
            left[:, i:stop] -= errors[:, i - start, None] * inverse[i, i:stop]
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return codes


def _inverse_factor(inputs: Tensor) -> Tensor:
    """(C, K) -> fp32 (K, K), the upper Cholesky factor of the inverse of the inputs' second moment, damped.

    The moment of few rows shows directions that others do not have: it is shrunk towards a multiple of the identity, by
    as much as its own error (Ledoit & Wolf 2004). Of rows without any order, nothing but rounding to nearest is left.
    """
    rows = inputs.double()
    moment = (rows.t() @ rows).div_(len(rows))
    mean, square = moment.diagonal().mean().clamp_min(1e-10), torch.linalg.vector_norm(moment).square()
    error = (rows.square().sum(1).square().mean() - square) / len(rows)
    share = (error / (square - moment.shape[0] * mean.square()).clamp_min(1e-30)).clamp(0, 1)
    moment.mul_(1 - share).diagonal().add_((share + DAMPING) * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    return torch.linalg.cholesky(inverse, upper=True).float()
