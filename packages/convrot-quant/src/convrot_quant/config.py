"""Scheme (how one layer is quantized) and QuantConfig (which scheme each layer gets): frozen, JSON in and out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

WEIGHT_BITS = (4, 8)
ACTIVATION_BITS = (4, 8, 16)
GROUP_SIZES = (16, 64, 256, 1024)  # the regular Hadamard matrices that the kernels have: Kronecker powers of H4
WEIGHT_RULES = ("absmax", "mse")
WEIGHT_ROUNDINGS = ("nearest", "balanced", "gptq")
ACTIVATION_RULES = ("absmax",)
LOW_RANKS = range(0, 257, 8)  # tensor cores want multiples of 8; beyond 256 the branch is no small part of a product

# What a scheme's short name stands for beside its bits: what measured best on synthetic layers of FLUX's statistics and
# on mini-flux (docs/quality.md). At 4 bits a row loses more by coarse steps than by its clipped tail, at 8 bits not.
RECOMMENDED: Mapping[tuple[int, int], Mapping[str, Any]] = {
    (4, 4): {"weight_rule": "mse", "weight_rounding": "balanced", "activation_clip": 0.72},
    (4, 8): {"weight_rule": "mse", "weight_rounding": "balanced"},
    (4, 16): {"weight_rule": "mse", "weight_rounding": "balanced"},
    (8, 8): {"weight_rounding": "balanced"},
    (8, 16): {"weight_rounding": "balanced"},
}


def recommended_clip(in_features: int) -> float:
    """K -> the activation_clip of the recommended W4A4 for rows of K values.

    The longer a row, the farther its largest value lies in the tail: 0.85 was best at K=512 (mini-flux), 0.72 at K=3072
    (FLUX's statistics); between them the logarithm of K counts, as it does for the maximum of Gaussian values.
    """
    return round(min(0.85, max(0.7, 0.85 - 0.05 * math.log2(in_features / 512))), 3)


def _one_of(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or type(value) not in {type(choice) for choice in allowed}:  # 4.0 and True are in (1, 4)
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{owner}: {name} must be one of {choices}; got {value!r}")


def _known_keys(owner: str, data: object, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{owner}: expected an object with the keys {', '.join(known)}; got {type(data).__name__}")
    for key in data:
        if key not in known:
            raise ValueError(f"{owner}: unknown key {key!r}; known keys are {', '.join(known)}")
    return dict(data)


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is quantized: bits of weights and activations, rotation group, scale rules.

    The defaults are the paper's W4A4; `Scheme.parse("W4A4")` is the one with the rules that measured best.
    `activation_bits=16` means weight-only: activations are rotated and stay in their own dtype.
    `weight_rule`: "absmax", or "mse" (4 bits), the row scales with the least squared error.
    `weight_rounding`: "nearest"; "balanced", which keeps each group's sum and with it what a token's mean becomes; or
    "gptq" (4 bits), which needs rows that the layer reads: a Calibration chooses it.
    Both are decided when a layer is quantized: files and kernels are the same.
    `activation_clip` multiplies the absolute maximum of a row before the scale is made (0 < clip <= 1).
    `low_rank`: of a 16-bit branch beside 4-bit weights (low_rank.py), 0 for none, else a multiple of 8 up to 256.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    group_size: int = 256
    weight_rule: str = "absmax"
    activation_rule: str = "absmax"
    activation_clip: float = 1.0
    weight_rounding: str = "nearest"
    low_rank: int = 0

    def __post_init__(self) -> None:
        _one_of("Scheme", "weight_bits", self.weight_bits, WEIGHT_BITS)
        _one_of("Scheme", "activation_bits", self.activation_bits, ACTIVATION_BITS)
        _one_of("Scheme", "group_size", self.group_size, GROUP_SIZES)
        _one_of("Scheme", "weight_rule", self.weight_rule, WEIGHT_RULES)
        _one_of("Scheme", "activation_rule", self.activation_rule, ACTIVATION_RULES)
        _one_of("Scheme", "weight_rounding", self.weight_rounding, WEIGHT_ROUNDINGS)
        if self.weight_rule == "mse" and self.weight_bits != 4:
            raise ValueError(
                f"Scheme: weight_rule='mse' needs weight_bits=4; got weight_bits={self.weight_bits}; use 'absmax', "
                "whose 8-bit scales are as good"
            )
        if self.weight_rounding == "gptq" and self.weight_bits != 4:
            raise ValueError(
                f"Scheme: weight_rounding='gptq' needs weight_bits=4; got weight_bits={self.weight_bits}; "
                "use 'balanced'"
            )
        if type(self.low_rank) is not int or self.low_rank not in LOW_RANKS:  # 16.0 is in it
            raise ValueError(f"Scheme: low_rank must be 0 or a multiple of 8 up to 256; got {self.low_rank!r}")
        if self.low_rank and self.weight_bits != 4:
            raise ValueError(
                f"Scheme: low_rank={self.low_rank} needs weight_bits=4; got weight_bits={self.weight_bits}; use "
                "low_rank=0, 8-bit weights have no error to speak of"
            )
        clip = self.activation_clip
        if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0 < clip <= 1:
            raise ValueError(f"Scheme: activation_clip must be a number with 0 < activation_clip <= 1; got {clip!r}")

    @property
    def name(self) -> str:
        """The short name, such as "W4A4", or "W4A4-r16" with a branch of rank 16."""
        return f"W{self.weight_bits}A{self.activation_bits}" + (f"-r{self.low_rank}" if self.low_rank else "")

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme with a short name, in any case: W4A4, W4A8, W4A16, W8A8, W8A16, with the recommended scale rules.

        "W4A4-absmax" and the like: the paper's rules, nothing clipped, everything rounded to nearest.
        "W4A4-r16" and the like: with a low-rank branch.
        """
        pattern = r"w(\d+)a(\d+)(-absmax)?(?:-r(\d+))?"
        match = re.fullmatch(pattern, name.strip().lower()) if isinstance(name, str) else None
        if match is None:
            raise ValueError(
                f"Scheme: {name!r} is not a scheme name; use one like W4A4, W4A8, W4A16, W8A8 or W8A16, W4A4-absmax "
                "or W4A4-r16"
            )
        bits = int(match[1]), int(match[2])
        rules = {} if match[3] else RECOMMENDED.get(bits, {})
        return cls(weight_bits=bits[0], activation_bits=bits[1], low_rank=int(match[4] or 0), **rules)

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON; no word of a branch where there is none, as files before it."""
        return {name: value for name, value in asdict(self).items() if name != "low_rank" or value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scheme:
        """The inverse of to_dict; missing keys take their defaults, unknown keys are refused by name."""
        return cls(**_known_keys("Scheme", data, tuple(f.name for f in fields(cls))))


def _as_scheme(where: str, value: Scheme | str) -> Scheme:
    if isinstance(value, str):
        return Scheme.parse(value)
    if not isinstance(value, Scheme):
        raise ValueError(f"QuantConfig: {where} must be a Scheme or a name like 'W4A8'; got {value!r}")
    return value


@dataclass(frozen=True)
class QuantConfig:
    """Which scheme each layer gets: a default, overrides by glob (later ones win), layers kept in 16 bits (these win).

    Globs match full module names with fnmatch, `*` crossing dots. `{last}` in a glob stands for the last index of the
    outermost ModuleList, whatever the model's depth: `single_transformer_blocks.{last}.proj_out`.
    An override that names a layer in full, without wildcards, also lifts the rules of taste (layers outside the
    repeated blocks, small layers); it never lifts a rule without which the layer could not run.
    """

    scheme: Scheme = field(default_factory=lambda: Scheme.parse("W4A4"))
    overrides: Mapping[str, Scheme] = field(default_factory=dict)
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.keep, (tuple, list)):
            raise ValueError(f"QuantConfig: keep must be a sequence of globs; got {self.keep!r}")
        overrides = {glob: _as_scheme(f"the override of {glob!r}", value) for glob, value in self.overrides.items()}
        for glob in (*overrides, *self.keep):
            if not isinstance(glob, str) or not glob:
                raise ValueError(f"QuantConfig: a glob must be a non-empty string; got {glob!r}")
        object.__setattr__(self, "scheme", _as_scheme("scheme", self.scheme))
        object.__setattr__(self, "overrides", overrides)
        object.__setattr__(self, "keep", tuple(self.keep))

    @classmethod
    def preset(cls, name: str) -> QuantConfig:
        """A named configuration of presets.py: ours, paper, paper-mixed, w4a8, w4a16, w8a8, w8a16, text-encoder.

        "ours-r16" and the like: with a branch of that rank beside every 4-bit layer, modulation excepted.
        """
        from convrot_quant.presets import MODULATION_GLOBS, PRESETS

        match = re.fullmatch(r"(.+?)(?:-r(\d+))?", name.strip().lower()) if isinstance(name, str) else None
        preset = PRESETS.get(match[1]) if match else None
        if match is None or preset is None:
            raise ValueError(
                f"QuantConfig: unknown preset {name!r}; presets are {', '.join(PRESETS)}, and ours-r16 or the like for "
                "one with low-rank branches"
            )
        rank = int(match[2] or 0)

        def branched(value: Scheme | str) -> Scheme:
            return replace(_as_scheme(match[1], value), low_rank=rank)

        modulation = dict.fromkeys(MODULATION_GLOBS, Scheme.parse(preset.modulation))
        overrides = modulation | {glob: branched(value) for glob, value in preset.overrides.items()}
        return cls(scheme=branched(preset.scheme), overrides=overrides, keep=preset.keep)

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON; the order of overrides is kept, since later ones win."""
        overrides = {glob: scheme.to_dict() for glob, scheme in self.overrides.items()}
        return {"scheme": self.scheme.to_dict(), "overrides": overrides, "keep": list(self.keep)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantConfig:
        """The inverse of to_dict; schemes may also be short names; unknown keys are refused by name."""
        values = _known_keys("QuantConfig", data, tuple(f.name for f in fields(cls)))
        if "scheme" in values:
            values["scheme"] = _scheme_from_json(values["scheme"])
        if "overrides" in values:
            if not isinstance(values["overrides"], Mapping):
                raise ValueError(f"QuantConfig: overrides must map globs to schemes; got {values['overrides']!r}")
            values["overrides"] = {glob: _scheme_from_json(item) for glob, item in values["overrides"].items()}
        if "keep" in values:
            if not isinstance(values["keep"], (list, tuple)):
                raise ValueError(f"QuantConfig: keep must be a list of globs; got {values['keep']!r}")
            values["keep"] = tuple(values["keep"])
        return cls(**values)

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> QuantConfig:
        """The inverse of to_json."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"QuantConfig: not valid JSON: {error}") from None
        return cls.from_dict(data)


def _scheme_from_json(value: Any) -> Scheme:
    return Scheme.parse(value) if isinstance(value, str) else Scheme.from_dict(value)
