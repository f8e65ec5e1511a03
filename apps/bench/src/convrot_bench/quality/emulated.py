"""EmulatedLinear: a linear in rotated low-bit codes under any rotation and any levers, in fp32, on any device.

y = round(R x') round(R W)^T + what was set aside in 16 bits. With the regular matrix and no levers it computes what
ConvLinear4bit computes; there is no kernel for the other rotations, nor for most of the levers. Products in 16 bits are
emulated in fp32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrot_bench.quality.levers import Cost, Layer, Levers
from convrot_bench.quality.rounding import gptq, principal, round_activation, round_weight
from convrot_kernels import transforms
from convrot_quant.low_rank import leading

PEEL_GROUP = 256


class Rotation(nn.Module):
    """x R by blocks of n channels; R is a matrix (n, n), or left (x) right of p q = n with far fewer products."""

    right: Tensor
    left: Tensor | None

    def __init__(self, right: Tensor, left: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("right", right)
        self.register_buffer("left", left)
        self.size = right.shape[0] * (1 if left is None else left.shape[0])

    @classmethod
    def across(cls, k: int) -> "Rotation":
        """One Hadamard matrix over all K channels (QuaRot's), K = 2^a times 1, 12, 20, 28, ..."""
        order, power = transforms.global_order(k)
        return cls(transforms.sylvester(power), transforms.global_hadamard(order))

    def forward(self, x: Tensor) -> Tensor:
        """fp32 (..., K) -> fp32 (..., K)."""
        if self.left is None:
            return transforms.apply_blockwise(x, self.right)
        blocks = x.unflatten(-1, (-1, self.left.shape[0], self.right.shape[0]))
        return (self.left.t() @ (blocks @ self.right)).flatten(-3)


class EmulatedLinear(nn.Module):
    """A quantized linear that never leaves fp32; `cost` says what it would store and multiply."""

    weight: Tensor
    order: Tensor | None
    sums: Tensor | None
    basis: Tensor | None
    images: Tensor | None
    up: Tensor | None
    down: Tensor | None

    def __init__(self, layer: Layer, rotation: Rotation, levers: Levers = Levers()) -> None:
        super().__init__()
        linear = layer.linear
        weight = linear.weight.detach().float()
        self.rotation, self.levers, self.bias = rotation.to(weight.device), levers, linear.bias
        self.bits, self.shift = layer.scheme.activation_bits, layer.shift
        self.parts = _parts(layer, levers)
        self.register_buffer("order", _order(layer, levers, rotation.size))
        calibration = None if layer.calibration is None else self._ordered(layer.calibration.float().to(weight.device))
        rotated = self.rotation(self._ordered(weight))
        self._quantize(rotated, layer.scheme.weight_bits, calibration)
        self.register_buffer("sums", self._weight_sums(self._ordered(weight)))
        self.register_buffer("basis", None)
        self.register_buffer("images", None)
        if levers.subspace:
            assert calibration is not None, "a method with a subspace asks for calibration"
            self.basis = principal(self._set_aside(calibration)[0], levers.subspace)
            self.images = self._ordered(weight) @ self.basis
        self.cost = self._cost(layer.scheme.weight_bits, linear)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), same dtype."""
        wide = self._ordered(x.float())
        moved, out = self._set_aside(wide)
        rotated = self.rotation(moved)
        out = out + F.linear(self._round(rotated), self.weight) + self._side(rotated)
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)

    def _quantize(self, rotated: Tensor, bits: int, calibration: Tensor | None) -> None:
        """Sets weight, up and down: rotated is about weight + up @ down."""
        levers = self.levers
        inputs = None if calibration is None else self.rotation(calibration)
        up, down, branch = None, None, None
        if levers.side_rank and levers.side_of == "weight":
            up, down = leading(rotated, levers.side_rank)
            branch = up @ down
        rest = rotated if branch is None else rotated - branch
        rule, group = levers.weight_rule, levers.weight_group
        if levers.gptq:
            assert inputs is not None, "a method with GPTQ asks for calibration"
            quantized = gptq(rest, inputs, bits, rule, group)
        else:
            quantized = round_weight(rest, bits, rule, group, balanced=levers.balanced)
        if levers.side_rank and levers.side_of == "residual":
            up, down = leading(rotated - quantized, levers.side_rank)
        elif levers.side_rank and levers.side_of == "inputs":
            assert inputs is not None, "a method with a branch along inputs asks for calibration"
            basis = principal(inputs, levers.side_rank)
            up, down = (rotated - quantized) @ basis, basis.t().contiguous()
        for name, value in (("weight", quantized), ("up", up), ("down", down)):
            self.register_buffer(name, value)

    def _set_aside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., K) -> what is left for the codes (..., K), and the product of what was taken out, (..., N) or less."""
        out = torch.zeros((), device=x.device)
        vector = self._common(x)
        if vector is not None:
            x, out = x - vector, self._multiply(vector)
        if self.sums is not None:
            means = x.unflatten(-1, (self.sums.shape[1], -1)).mean(-1)
            x = x - means.repeat_interleave(x.shape[-1] // means.shape[-1], dim=-1)
            out = out + F.linear(means, self.sums)
        if self.basis is not None and self.images is not None:
            inside = x @ self.basis
            x, out = x - F.linear(inside, self.basis), out + F.linear(inside, self.images)
        return x, out

    def _common(self, x: Tensor) -> Tensor | None:
        """-> what every token of an image has in common, (K,) or (B, 1, K): AdaLN's shift, or the mean over tokens.

        Rows of several images, as a probe keeps them, have no shift in common: there their mean stands for it.
        """
        levers = self.levers
        if levers.shift and self.shift is not None:
            found = self.shift()
            if found is not None and found.shape[:-1] in ((), (*x.shape[:-2], 1)):
                return self._ordered(found.float().to(x.device))
        elif not levers.centre:
            return None
        return x.mean(-2, keepdim=True) if x.dim() > 1 and x.shape[-2] > 1 else None

    def _multiply(self, vector: Tensor) -> Tensor:
        """(..., K) -> (..., N) by the weight that is stored, the vector in 16 bits."""
        rotated = self.rotation(vector)
        return F.linear(rotated, self.weight) + self._side(rotated)

    def _side(self, rotated: Tensor) -> Tensor:
        if self.up is None or self.down is None:
            return torch.zeros((), device=rotated.device)
        return F.linear(F.linear(rotated, self.down), self.up)

    def _round(self, rotated: Tensor) -> Tensor:
        if self.bits == 16:
            return rotated
        levers = self.levers
        rounded = []
        for part, one_sided in zip(rotated.split(self.parts[0], -1), self.parts[1], strict=True):
            groups = part if levers.activation_group is None else part.unflatten(-1, (-1, levers.activation_group))
            asymmetric = levers.asymmetric and one_sided
            out = round_activation(groups, self.bits, clip=levers.clip, rms=levers.rms, asymmetric=asymmetric)
            rounded.append(out.view_as(part))
        return torch.cat(rounded, -1)

    def _ordered(self, x: Tensor) -> Tensor:
        return x if self.order is None else x[..., self.order]

    def _weight_sums(self, weight: Tensor) -> Tensor | None:
        """-> (N, groups): row sums of the weight over each group of channels whose mean is peeled."""
        if self.levers.peel == "none":
            return None
        n, k = weight.shape
        groups = 1 if self.levers.peel == "token" else k // PEEL_GROUP
        if self.levers.peel_sums == "exact":
            return weight.view(n, groups, -1).sum(-1)
        ones = torch.eye(groups, device=weight.device).repeat_interleave(k // groups, dim=1)
        return self._multiply(ones).t().contiguous()

    def _cost(self, bits: int, linear: nn.Linear) -> Cost:
        n, k, levers = linear.out_features, linear.in_features, self.levers
        scales = 4 * n if levers.weight_group is None else 2 * n * k // levers.weight_group
        stored = n * k * bits // 8 + scales + _bytes(linear.bias)
        beside = (levers.side_rank + levers.subspace) * (n + k)
        if self.sums is not None:
            stored += 2 * self.sums.numel() if levers.peel_sums == "exact" else 0
            beside += self.sums.numel()
        if levers.asymmetric and any(self.parts[1]):
            beside += n  # the middle of the range times a row sum
        stored += 2 * (levers.side_rank + levers.subspace) * (n + k) + (0 if self.order is None else 2 * k)
        if self.bits == 16:  # weights alone are widened before the product
            return Cost(stored, {"16x16": n * k + beside})
        return Cost(stored, {f"{self.bits}x{bits}": n * k} | ({"16x16": beside} if beside else {}))


def _parts(layer: Layer, levers: Levers) -> tuple[list[int], list[bool]]:
    """-> (columns, whether they are GELU's) of each part of the input that has its own activation scale."""
    k, one_sided = layer.linear.in_features, layer.kind in ("gelu", "proj_out")
    if levers.split and layer.split is not None:
        return [layer.split, k - layer.split], [False, one_sided]
    return [k], [one_sided]


def _order(layer: Layer, levers: Levers, size: int) -> Tensor | None:
    """-> (K,) permutation that deals a part's channels to its blocks, largest first, back and forth; None: as it is."""
    if levers.permute == "none":
        return None
    source = layer.linear.weight.detach() if levers.permute == "weight" else layer.calibration
    assert source is not None, "a method that permutes by activations asks for calibration"
    mass = source.float().square().sum(0).to(layer.linear.weight.device)
    dealt, start = [], 0
    for part in mass.split(_parts(layer, levers)[0]):
        table = part.argsort(descending=True).view(size, -1)
        table[1::2] = table[1::2].flip(1)
        dealt.append(start + table.t().reshape(-1))
        start += len(part)
    return torch.cat(dealt)


def _bytes(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.numel() * bias.element_size()
