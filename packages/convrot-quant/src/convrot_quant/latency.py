"""How long a layer takes, by a simple table: products at the rate of the bits that are multiplied, or its bytes read.

For choosing between schemes, not for promises: of a step it counts the linears alone, each at its machine's best rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from convrot_quant.plans import LayerPlan
from convrot_quant.presets import MODULATION_GLOBS

MEASURED = 0.69  # of its data sheet's rates, which an H200 reaches in 8 and in 16 bits
TEXT_GLOBS = ("*.add_?_proj", "*.to_add_out", "*context*")  # layers of two-stream blocks that read text alone
JOINT_GLOBS = ("single_*",)  # and blocks that read text and image in a row


@dataclass(frozen=True)
class Machine:
    """10^12 operations a second by the bits of the wider operand, and 10^9 bytes a second."""

    about: str
    tops: Mapping[int, float]
    gb_s: float


def _data_sheet(about: str, tops: Mapping[int, float], gb_s: float) -> Machine:
    rates = {bits: MEASURED * rate for bits, rate in tops.items()}
    return Machine(f"{about}, 69 % of its data sheet", rates, MEASURED * gb_s)


MACHINES: Mapping[str, Machine] = {
    # all products of a FLUX.1-dev step, and a 16-bit modulation layer (docs/results/ops.jsonl); 4 bits run as 8
    "h200": Machine("H200, measured", {4: 1367, 8: 1367, 16: 658}, 3700),
    "a100": _data_sheet("A100 80GB", {4: 1248, 8: 624, 16: 312}, 2039),
    "rtx4090": _data_sheet("RTX 4090", {4: 1321, 8: 661, 16: 165}, 1008),
}


@dataclass(frozen=True)
class Workload:
    """One image on a machine: how many rows its layers multiply."""

    machine: Machine
    tokens: int = 4096  # of the image: 1024 x 1024 pixels in FLUX.1
    text_tokens: int = 512

    def rows(self, name: str) -> int:
        """M of a layer's product."""
        if _matches(name, MODULATION_GLOBS):
            return 1
        if _matches(name, JOINT_GLOBS):
            return self.tokens + self.text_tokens
        return self.text_tokens if _matches(name, TEXT_GLOBS) else self.tokens

    def seconds(self, layer: LayerPlan) -> float:
        """2 M N K at the rate of what is multiplied, or reading the layer where that takes longer; and its branch."""
        bits = 16 if layer.scheme is None else max(layer.scheme.weight_bits, layer.scheme.activation_bits)
        rows, n, k = self.rows(layer.name), layer.out_features, layer.in_features
        product = 2 * rows * n * k / (self.machine.tops[bits] * 1e12)
        reading = self.machine.gb_s * 1e9
        # a branch reads the input and adds to the output, both in 16 bits
        branch = rows * (k + 2 * n) * 2 / reading if layer.scheme is not None and layer.scheme.low_rank else 0.0
        return max(product, layer.bytes_after / reading) + branch


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
