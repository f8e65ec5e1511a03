"""What a FLUX layer's input is, by the layer's name: its kind, where GELU's part begins, AdaLN's shift in it."""

import re
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from convrot_bench.quality.levers import Layer
from convrot_quant import Scheme
from convrot_quant.presets import MODULATION_GLOBS

_GLOBS = {
    "modulation": MODULATION_GLOBS,
    "attention": ("*.attn.to_out.0", "*.attn.to_add_out"),
    "gelu": ("*.ff.net.2", "*.ff_context.net.2"),
    "proj_out": ("single_transformer_blocks.*.proj_out",),
    "modulated": ("*.attn.to_[qkv]", "*.attn.add_[qkv]_proj", "*.net.0.proj", "*.proj_mlp"),
}
# (a layer's name within its block) -> (the modulation that shifts its input, its outputs' parts, which one)
_SHIFTS = (
    (r"transformer_blocks\.\d+\.attn\.to_[qkv]", ("norm1.linear", 6, 0)),
    (r"transformer_blocks\.\d+\.attn\.add_[qkv]_proj", ("norm1_context.linear", 6, 0)),
    (r"transformer_blocks\.\d+\.ff\.net\.0\.proj", ("norm1.linear", 6, 3)),
    (r"transformer_blocks\.\d+\.ff_context\.net\.0\.proj", ("norm1_context.linear", 6, 3)),
    (r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp)", ("norm.linear", 3, 0)),
)


def kind_of(name: str) -> str:
    """modulation, attention, gelu, proj_out, modulated or other."""
    return next((kind for kind, globs in _GLOBS.items() if any(fnmatchcase(name, g) for g in globs)), "other")


class ShiftTap:
    """A forward hook on a modulation linear: keeps the shift (B, 1, K) of the running step."""

    def __init__(self, parts: int, index: int) -> None:
        self.parts, self.index = parts, index
        self.shift: Tensor | None = None

    def __call__(self) -> Tensor | None:
        return self.shift

    def hook(self, _module: nn.Module, _arguments: Any, output: Tensor) -> None:
        self.shift = output.chunk(self.parts, dim=-1)[self.index].unsqueeze(1)


class Roles:
    """Describes the layers of one model to methods; attach() once they are replaced, so that shifts are seen."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._taps: dict[tuple[str, int, int], ShiftTap] = {}

    def layer(self, name: str, scheme: Scheme, calibration: Tensor | None = None) -> Layer:
        linear, kind = self._model.get_submodule(name), kind_of(name)
        assert isinstance(linear, nn.Linear), "a plan names linears"
        split = linear.out_features if kind == "proj_out" and linear.in_features > linear.out_features else None
        return Layer(linear, scheme, kind, split, self._tap(name), calibration)

    def attach(self) -> None:
        """Hooks on the modulations as they are now."""
        for (name, _, _), tap in self._taps.items():
            self._model.get_submodule(name).register_forward_hook(tap.hook)

    def _tap(self, name: str) -> ShiftTap | None:
        for pattern, (modulation, parts, index) in _SHIFTS:
            if re.fullmatch(pattern, name):
                block = ".".join(name.split(".")[:2])
                key = (f"{block}.{modulation}", parts, index)
                return self._taps.setdefault(key, ShiftTap(parts, index))
        return None
