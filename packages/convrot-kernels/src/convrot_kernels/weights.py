"""Quantizing a weight, once and offline: scales with the least squared error, and rounding that keeps sums.

For a row y and a scale s, code magnitudes are the number of thresholds (j - 1/2) s, j = 1..qmax, that |y| reaches, so
    E(s) = sum (|y| - s c)^2 = Syy - 2 s Syc + s^2 Scc,    Syc = sum_j sum(|y| from t_j),  Scc = sum_j (2 j - 1) #(t_j)
and with |y| sorted and summed up once, E of any s is qmax lookups. While the codes stay, the best scale is Syc / Scc:
from the best scales of a grid, taking it again and again (Lloyd 1982, Max 1960) ends in the least E.

Balanced rounding: the regular Hadamard matrix leaves constants alone, so what a token's mean m contributes is m times
the sum of the row, and rounding to nearest gets that sum wrong by sqrt(K / 12) steps. Where the errors of a group add
up to n steps, the n values nearest to the next code go there: the sum is right to half a step, for 0.5 % more error.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from convrot_kernels import checks, reference
from convrot_kernels.ops import rotate_quantize

COARSE = (-4.0, 0.2, 64)  # octaves around absmax / qmax, and how many scales between them: 4.7 % apart
FINE = (-0.15, 0.15, 64)  # around the best of those: 0.3 % apart
STARTS = 8  # the best scales of the fine grid, from each of which the error is followed down
ROUNDS = 12  # by which codes repeat
_BLOCK = 1 << 22  # values sorted at a time: 100 MB of work space
_GPU_BLOCK = 1 << 24  # and on a GPU, where a hundred launches a block cost more than the work of a small one
_FINENESS = 1 << 19  # of a step, to which values are told apart: with 1024 columns and a sign 31 bits


def quantize_weight(
    weight: Tensor,
    group_size: int = 256,
    bits: int = 4,
    *,
    packed: bool = False,
    rule: str = "absmax",
    rounding: str = "nearest",
) -> tuple[Tensor, Tensor]:
    """(N, K) fp16, bf16 or fp32 -> codes int8 (N, K) or, packed, uint8 (N, K/2); scale fp32 (N,).

    rule "absmax": the scale at which no value is clipped. "mse" (4 bits): for each row the scale with the least squared
    error of the rotated row, about 0.65 of it for Gaussian rows and 3072 columns.
    rounding "nearest", or "balanced": codes are moved by a step where that makes the sum of a group's errors nothing.
    "absmax" and "nearest" are rotate_quantize, whose row rule for inf and NaN holds for all. Runs where the weight is.
    """
    checks.quantize_weight(weight, group_size, bits, packed, rule, rounding)
    if (rule, rounding) == ("absmax", "nearest"):
        return rotate_quantize(weight.detach(), group_size, bits, packed=packed)
    block = _BLOCK if weight.device.type == "cpu" else _GPU_BLOCK
    blocks = weight.detach().split(max(1, block // weight.shape[1]))
    parts = [_quantized(rows, group_size, bits, rule, rounding) for rows in blocks]
    codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return (reference.pack_int4(codes) if packed else codes), scale


def _quantized(rows: Tensor, group_size: int, bits: int, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    qmax = reference.QMAX[bits]
    rotated = reference.rotate(rows.float(), group_size)  # the same codes on every device and backend
    scale = mse_scale(rotated, qmax) if rule == "mse" else reference.row_scale(rotated, qmax)
    if rounding == "balanced":
        return balanced_codes(rotated, scale, group_size, qmax), scale
    return reference.codes_of(rotated, scale, qmax), scale


def balanced_codes(rotated: Tensor, scale: Tensor, group_size: int, qmax: int) -> Tensor:
    """fp32 (N, K) and (N,) -> int8 (N, K): nearest, but for the values whose move makes a group's sum right."""
    finite = scale.isfinite().unsqueeze(-1)
    steps = torch.where(finite, rotated / scale.unsqueeze(-1), 0.0).unflatten(-1, (-1, group_size))
    codes = steps.round().clamp_(-qmax, qmax)
    left = steps.sub_(codes)
    total = left.sum(-1, keepdim=True)
    up = total.sign()
    full = codes * up >= qmax  # no code beyond the last, even where a whole group is clipped
    count = total.abs().round().minimum((~full).sum(-1, keepdim=True))
    most = int(count.max()) if count.numel() else 0
    # integers, each with its column in its last bits: sorted by values alone, and the same on every device
    key = (left * up).clamp_(-1.0, 1.0).mul_(_FINENESS).round_().to(torch.int32)
    key = key.masked_fill_(full, -2 * _FINENESS)
    key = key.mul_(group_size).add_(torch.arange(group_size, dtype=torch.int32, device=key.device))
    last = _sorted(key)[..., group_size - most :] & (group_size - 1)
    moved = torch.arange(most, 0, -1, device=rotated.device) <= count
    return codes.scatter_add_(-1, last.long(), moved * up).to(torch.int8).flatten(-2)


def _sorted(values: Tensor) -> Tensor:
    """(..., K) -> (..., K), every row from its least value on. NumPy's sort takes a tenth of torch's time on a CPU."""
    if values.device.type == "cpu" and find_spec("numpy"):
        import numpy

        return torch.from_numpy(numpy.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def mse_scale(rotated: Tensor, qmax: int) -> Tensor:
    """fp32 (N, K) -> fp32 (N,): the scales with the least squared error; NaN for rows that are not finite."""
    values = _sorted(rotated.abs())
    finite = values[:, -1:].isfinite()
    row = _Row(values.masked_fill_(~finite, 0.0), qmax)
    scale = row.least(_around(values[:, -1:] / qmax, *COARSE), 1)
    scale = row.least(_around(scale, *FINE), STARTS)
    for _ in range(ROUNDS):
        scale = row.best(scale)
    scale = row.least(scale, 1)
    return scale.clamp_min_(reference.SCALE_FLOOR).masked_fill_(~finite, float("nan")).squeeze(1)


def _around(scale: Tensor, first: float, last: float, count: int) -> Tensor:
    """(N, 1) -> (N, count): multiples of each scale, from 2^first to 2^last."""
    return scale * torch.linspace(first, last, count, device=scale.device).exp2()


class _Row:
    """Rows of sorted magnitudes, summed up: what the error of any scale is read from."""

    def __init__(self, sorted_values: Tensor, qmax: int) -> None:
        self.values, self.qmax = sorted_values, qmax
        summed = sorted_values.double().cumsum(-1)
        self.sums = torch.cat((summed.new_zeros(len(summed), 1), summed), dim=1)  # of the first i values
        self.halves = torch.arange(qmax, device=summed.device) + 0.5

    def _moments(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(N, S) scales -> sum of |y| c and of c^2, fp64 (N, S)."""
        thresholds = scale.unsqueeze(-1) * self.halves
        below = torch.searchsorted(self.values, thresholds.flatten(1))
        above = (self.sums[:, -1:] - self.sums.gather(1, below)).view(thresholds.shape)
        count = (self.values.shape[1] - below).view(thresholds.shape).double()
        return above.sum(-1), count @ (2 * self.halves.double())

    def least(self, scale: Tensor, count: int) -> Tensor:
        """(N, S) -> (N, count): the scales with the least E, without its constant Syy."""
        product, square = self._moments(scale)
        error = scale.double() * (scale.double() * square - 2 * product)
        return scale.gather(1, error.topk(count, dim=1, largest=False).indices)

    def best(self, scale: Tensor) -> Tensor:
        """(N, S) -> (N, S): the best scale for the codes that each scale gives; a scale without codes stays."""
        product, square = self._moments(scale)
        return torch.where(square > 0, product / square, scale.double()).to(scale.dtype)
