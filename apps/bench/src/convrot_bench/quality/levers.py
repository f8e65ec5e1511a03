"""Levers (what an emulated layer does beyond the paper) and Layer (what a method is told about a layer)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from convrot_quant import Scheme

Peel = Literal["none", "token", "group"]
Sums = Literal["exact", "quantized"]
SideOf = Literal["weight", "residual", "inputs"]
Permutation = Literal["none", "weight", "activation"]


@dataclass(frozen=True)
class Levers:
    """One switch a lever; the defaults are the paper's scheme. None of them changes what a 16-bit layer computes.

    `weight_rule`: absmax, or mse (the row scale of least squared error). `balanced`: rounding that keeps the sum of
    each group of 256 columns. `weight_group`: columns per weight scale.
    `clip`: the share of a token's absmax that the last code stands for; `rms`: that bound in multiples of the token's
    rms, where it is the smaller one (times qmax: min(absmax / qmax, rms * token_rms) is the step).
    `activation_group`: columns per activation scale. `split`: own activation scales for the two parts of proj_out.
    `asymmetric`: 16 activation codes around the middle of a token's range instead of 15 around zero, for GELU outputs.
    `peel`: a token's mean, or that of each group of 256 channels, multiplied in 16 bits by sums of weight rows:
    `peel_sums` of the 16-bit weight (stored) or of the quantized one. `shift`: AdaLN's shift leaves the codes, its
    product is added once an image. `centre`: the same for the mean of each channel over the tokens.
    `subspace`: a token's component in that many principal directions of calibration tokens leaves the codes and meets
    the 16-bit weight. `side_rank`: a 16-bit branch from the leading singular vectors of the weight, before it is
    quantized, or of what quantizing left, or of that along the principal directions of calibration tokens.
    `permute`: channels dealt to groups so that each group has the same mass of weight or calibration activation.
    `gptq`: weights rounded one column after the other on calibration tokens.
    """

    weight_rule: Literal["absmax", "mse"] = "absmax"
    balanced: bool = False
    weight_group: int | None = None
    clip: float = 1.0
    rms: float | None = None
    activation_group: int | None = None
    split: bool = False
    asymmetric: bool = False
    peel: Peel = "none"
    peel_sums: Sums = "exact"
    shift: bool = False
    centre: bool = False
    subspace: int = 0
    side_rank: int = 0
    side_of: SideOf = "weight"
    permute: Permutation = "none"
    gptq: bool = False

    @classmethod
    def of(cls, scheme: Scheme) -> "Levers":
        """The scale rules of a scheme and nothing else."""
        rule: Literal["absmax", "mse"] = "mse" if scheme.weight_rule == "mse" else "absmax"
        return cls(weight_rule=rule, balanced=scheme.weight_rounding == "balanced", clip=scheme.activation_clip)

    @property
    def needs_calibration(self) -> bool:
        by_side = self.side_rank > 0 and self.side_of == "inputs"
        return self.gptq or self.subspace > 0 or self.permute == "activation" or by_side


@dataclass(frozen=True)
class Layer:
    """A 16-bit linear to be replaced: the scheme planned for it, what its input is, and what else a method may use.

    `kind`: modulation, modulated, attention, gelu, proj_out or other. `split`: the column where the GELU part of
    proj_out begins. `shift()`: the AdaLN shift in the input of the running call, (K,) or (B, 1, K), or None.
    `calibration`: (C, K) inputs from tuning captions or seeds, where the method asked for them.
    """

    linear: nn.Linear
    scheme: Scheme
    kind: str = "other"
    split: int | None = None
    shift: Callable[[], Tensor | None] | None = None
    calibration: Tensor | None = None


@dataclass(frozen=True)
class Cost:
    """What a layer stores and multiplies: bytes, and products of a token by the bits of their operands.

    `macs`: {"4x4": N K, "16x16": ...}: activation bits x weight bits.
    """

    bytes: int
    macs: dict[str, int]
