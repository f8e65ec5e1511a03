"""SVDQuant-style: smoothing, a 16-bit low-rank branch, the residual in 4 bits with a scale for 64 columns.

After the published recipe (arXiv 2411.05007 and its deepcompressor configuration): per channel x / s and W s, with
s = max|x|^a / max|w|^(1 - a), a of 20 points chosen by the layer's output error on calibration tokens; then
W s = L + R with L the leading singular vectors, refined in turns with the rounding of R for as long as the output error
falls; activations and R have a scale for 64 columns. GELU outputs get + 0.171875, so that they are not negative, and
16 codes from zero. proj_out is two linears (attention, MLP), each with its branch; modulation is weight-only, in groups
of 64.
Not here: GPTQ on the residual.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrot_bench.quality.levers import Cost, Layer
from convrot_bench.quality.rounding import QMAX, absmax_scale, round_to, round_weight
from convrot_quant.low_rank import leading

GROUP = 64
GELU_SHIFT = 0.171875  # what GELU's outputs lack to be positive, rounded up to bf16
GRID = 20
REFINEMENTS = 8
CALIBRATION_ROWS = 512


def branch_rank(k: int) -> int:
    """The published rank 32 at K=3072, in proportion, 4 at least."""
    return max(4, round(32 * k / 3072))


def stored_bytes(n: int, k: int, bits: int = 4) -> int:
    """Codes, their 16-bit scales, the branch and the smoothing of a weight (N, K)."""
    return n * k * bits // 8 + 2 * n * k // GROUP + 2 * branch_rank(k) * (n + k) + 2 * k


class SVDQuantLinear(nn.Module):
    """y = round(x / s) round(R)^T + (x / s) L^T + bias, in fp32; the calibration tokens decide on s and L."""

    smooth: Tensor
    weight: Tensor
    up: Tensor
    down: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, calibration: Tensor, *, bits: int = 4, gelu: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.bits, self.shift = bits, GELU_SHIFT if gelu else 0.0
        rows = calibration[:: max(1, len(calibration) // CALIBRATION_ROWS)][:CALIBRATION_ROWS]
        x = rows.float().to(weight.device) + self.shift
        wanted = F.linear(x, weight)
        self.register_buffer("smooth", self._smoothing(x, weight, wanted))
        self._factorize(x / self.smooth, weight * self.smooth, wanted)
        bias = None if linear.bias is None else linear.bias.detach().float()
        if gelu:
            bias = (0 if bias is None else bias) - self.shift * weight.sum(1)
        self.register_buffer("bias", bias)
        self.cost = self._cost(linear)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), same dtype."""
        smooth = (x.float() + self.shift) / self.smooth
        out = self._product(smooth, self.weight) + F.linear(F.linear(smooth, self.down), self.up)
        return (out if self.bias is None else out + self.bias).to(x.dtype)

    def _product(self, smooth: Tensor, weight: Tensor) -> Tensor:
        """The 4-bit part: activations rounded in groups, codes from zero where a shift has made them positive."""
        groups = smooth.unflatten(-1, (-1, GROUP))
        if self.shift:
            levels = 2 * QMAX[self.bits] + 1
            scale = (groups.amax(-1, keepdim=True) / levels).clamp_min(1e-10)
            rounded = (groups / scale).round_().clamp_(0, levels) * scale
        else:
            rounded = round_to(groups, absmax_scale(groups, self.bits), QMAX[self.bits])
        return F.linear(rounded.flatten(-2), weight)

    def _smoothing(self, x: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
        """-> (K,): of the grid, what makes the layer's rounded output nearest, no branch beside it."""
        of_x, of_w = x.abs().amax(0).clamp_min(1e-5), weight.abs().amax(0).clamp_min(1e-5)
        best, least = torch.ones_like(of_x), float("inf")
        for i in range(GRID + 1):
            alpha = i / GRID
            smooth = of_x**alpha / of_w ** (1 - alpha) if i else torch.ones_like(of_x)
            error = self._error(x / smooth, round_weight(weight * smooth, self.bits, group=GROUP), wanted)
            if error < least:
                best, least = smooth, error
        return best

    def _factorize(self, x: Tensor, weight: Tensor, wanted: Tensor) -> None:
        """Sets up, down and the rounded residual; turns end when the output error stops falling."""
        least, rounded = float("inf"), torch.zeros_like(weight)
        for _ in range(REFINEMENTS):
            up, down = leading(weight - rounded, branch_rank(weight.shape[1]))
            rounded = round_weight(weight - up @ down, self.bits, group=GROUP)
            error = self._error(x, rounded, wanted - F.linear(F.linear(x, down), up))
            if error >= least:
                break
            least = error
            for name, value in (("up", up), ("down", down), ("weight", rounded)):
                self.register_buffer(name, value)

    def _error(self, x: Tensor, weight: Tensor, wanted: Tensor) -> float:
        return float((self._product(x, weight) - wanted).square().sum())

    def _cost(self, linear: nn.Linear) -> Cost:
        n, k, rank = linear.out_features, linear.in_features, self.up.shape[1]
        bias = 0 if linear.bias is None else linear.bias.numel() * linear.bias.element_size()
        return Cost(stored_bytes(n, k, self.bits) + bias, {f"{self.bits}x{self.bits}": n * k, "16x16": rank * (n + k)})


class SplitLinear(nn.Module):
    """A linear over [first | second] columns as the sum of two."""

    def __init__(self, first: SVDQuantLinear, second: SVDQuantLinear, split: int) -> None:
        super().__init__()
        self.first, self.second, self.split = first, second, split
        macs = {bits: count + second.cost.macs[bits] for bits, count in first.cost.macs.items()}
        self.cost = Cost(first.cost.bytes + second.cost.bytes, macs)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), same dtype."""
        return self.first(x[..., : self.split]) + self.second(x[..., self.split :])


def svdquant(layer: Layer) -> nn.Module:
    """The layer as SVDQuant has it; modulation is left to the caller."""
    assert layer.calibration is not None, "SVDQuant-style asks for calibration"
    bits, split = layer.scheme.activation_bits, layer.split
    if split is None:
        return SVDQuantLinear(layer.linear, layer.calibration, bits=bits, gelu=layer.kind == "gelu")
    first, second = _columns(layer.linear, slice(split)), _columns(layer.linear, slice(split, None), bias=False)
    return SplitLinear(
        SVDQuantLinear(first, layer.calibration[:, :split], bits=bits),
        SVDQuantLinear(second, layer.calibration[:, split:], bits=bits, gelu=True),
        split,
    )


def _columns(linear: nn.Linear, part: slice, *, bias: bool = True) -> nn.Linear:
    weight = linear.weight.detach()[:, part]
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    out.weight = nn.Parameter(weight, requires_grad=False)
    out.register_parameter("bias", linear.bias if bias else None)
    return out
