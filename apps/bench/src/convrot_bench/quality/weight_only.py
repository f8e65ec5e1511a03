"""Weight-only rivals: 4-bit weights that are widened before a 16-bit product; emulated in fp32."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrot_bench.quality.levers import Cost, Layer
from convrot_bench.quality.rounding import round_weight

# NF4's sixteen values (QLoRA, arXiv 2305.14314, appendix E): quantiles of a Gaussian, zero among them
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK, GROUP, TORCHAO_GROUP = 64, 64, 128


class WeightOnlyLinear(nn.Module):
    """y = x W'^T + bias, W' the rounded weight; `scale_bytes` a group of columns."""

    weight: Tensor

    def __init__(self, linear: nn.Linear, rounded: Tensor, group: int, scale_bytes: int) -> None:
        super().__init__()
        self.register_buffer("weight", rounded)
        self.bias = linear.bias
        products, bias = linear.weight.numel(), linear.bias
        extra = 0 if bias is None else bias.numel() * bias.element_size()
        self.cost = Cost(products // 2 + scale_bytes * products // group + extra, {"16x16": products})

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), same dtype."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight, bias).to(x.dtype)


def round_nf4(weight: Tensor) -> Tensor:
    """(N, K) -> (N, K): the nearest NF4 value times the absmax of each block of 64."""
    values = torch.tensor(NF4, device=weight.device)
    blocks = weight.float().reshape(-1, NF4_BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-10)
    codes = torch.bucketize(blocks / scale, (values[1:] + values[:-1]) / 2)
    return (values[codes] * scale).view_as(weight)


def round_affine(weight: Tensor, group: int = TORCHAO_GROUP) -> Tensor:
    """(N, K) -> (N, K): 16 codes between minimum and maximum of each group, torchao's int4 weight-only layout."""
    groups = weight.float().unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-10)
    return (((groups - low) / step).round_().clamp_(0, 15) * step + low).flatten(-2)


def nf4(layer: Layer) -> nn.Module:
    """fp32 scale a block, not quantized a second time."""
    return WeightOnlyLinear(layer.linear, round_nf4(layer.linear.weight.detach()), NF4_BLOCK, 4)


def int4(layer: Layer) -> nn.Module:
    """16-bit scale and zero point a group."""
    return WeightOnlyLinear(layer.linear, round_affine(layer.linear.weight.detach()), TORCHAO_GROUP, 4)


def symmetric_int4(layer: Layer) -> nn.Module:
    """What SVDQuant does to modulation: 15 codes, a 16-bit scale for 64 columns."""
    weight = layer.linear.weight.detach().float()
    return WeightOnlyLinear(layer.linear, round_weight(weight, 4, group=GROUP), GROUP, 2)


Maker = Callable[[Layer], nn.Module]
