"""Rounding to codes and back, in fp32: activation scales by rule, weight scales by search, GPTQ."""

import torch
from torch import Tensor

from convrot_kernels import weights
from convrot_quant.gptq import gptq_codes
from convrot_quant.low_rank import leading

QMAX = {4: 7, 8: 127}
SCALE_FLOOR = 1e-10  # an all-zero row has a scale
_SEARCHED = 1 << 22  # values searched for scales at a time
BALANCED = 256  # columns of a group whose sum balanced rounding keeps


def round_to(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """(..., K), (..., 1) -> (..., K): the nearest of the values -qmax..qmax times scale, half to even."""
    return (x / scale).round_().clamp_(-qmax, qmax).mul_(scale)


def round_activation(
    x: Tensor, bits: int, *, clip: float = 1.0, rms: float | None = None, asymmetric: bool = False
) -> Tensor:
    """(..., K) -> (..., K), one scale a row: clip * absmax, at most qmax * rms times the row's rms."""
    qmax = QMAX[bits]
    if asymmetric:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        middle, levels = (low + high) / 2, 2 * qmax + 1  # 2 qmax + 2 codes, the middle lies between two of them
        step = ((high - low) * (clip / levels)).clamp_min(SCALE_FLOOR)
        lowest = middle - step * (levels / 2)
        return ((x - lowest) / step).round_().clamp_(0, levels) * step + lowest
    scale = x.abs().amax(-1, keepdim=True) * (clip / qmax)
    if rms is not None:
        scale = torch.minimum(scale, x.square().mean(-1, keepdim=True).sqrt() * rms)
    return round_to(x, scale.clamp_min(SCALE_FLOOR), qmax)


def absmax_scale(weight: Tensor, bits: int) -> Tensor:
    """(..., K) -> (..., 1)."""
    return (weight.abs().amax(-1, keepdim=True) / QMAX[bits]).clamp_min(SCALE_FLOOR)


def mse_scale(weight: Tensor, bits: int) -> Tensor:
    """(..., K) -> (..., 1): the scale of least squared error of each row, the product's search."""
    rows = weight.reshape(-1, weight.shape[-1])
    found = [weights.mse_scale(part, QMAX[bits]) for part in rows.split(max(1, _SEARCHED // rows.shape[1]))]
    return torch.cat(found).view(*weight.shape[:-1], 1)


def round_weight(
    weight: Tensor, bits: int, rule: str = "absmax", group: int | None = None, *, balanced: bool = False
) -> Tensor:
    """(N, K) -> (N, K), a scale a row, or a row and `group` columns; balanced: sums of BALANCED columns are kept."""
    parts = weight if group is None else weight.unflatten(-1, (-1, group))
    scale = mse_scale(parts, bits) if rule == "mse" else absmax_scale(parts, bits)
    if not balanced:
        return round_to(parts, scale, QMAX[bits]).view_as(weight)
    rows, steps = parts.reshape(-1, parts.shape[-1]), scale.reshape(-1)
    codes = weights.balanced_codes(rows, steps, min(BALANCED, rows.shape[1]), QMAX[bits])
    return (codes * steps.unsqueeze(1)).view_as(weight)


def gptq(weight: Tensor, inputs: Tensor, bits: int, rule: str = "absmax", group: int | None = None) -> Tensor:
    """(N, K), calibration inputs (C, K) -> (N, K): the product's, with a scale a row, or a row and `group` columns.

    Scales are those of the rule on the weight as it was.
    """
    parts = weight if group is None else weight.unflatten(-1, (-1, group))
    scale = (mse_scale if rule == "mse" else absmax_scale)(parts, bits)
    scale = scale.expand(*parts.shape[:-1], parts.shape[-1]).reshape(weight.shape)
    return gptq_codes(weight, scale, inputs, QMAX[bits]) * scale


def principal(rows: Tensor, rank: int) -> Tensor:
    """(C, K) -> (K, r), orthonormal: the leading directions of the rows' second moment."""
    return torch.linalg.qr(leading(rows, rank)[1].t()).Q
