"""What quality has to reach, against the paper's scheme and the rivals, with what was measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convrot_bench.bars import MET, MISSED, Rows, head
from convrot_bench.quality.tables import all_seeds, by_shape, figures, mini_flux, synthetic

PAPER, MIXED, RIVAL = "paper_w4a4", "paper_mixed", "svdquant_style"
W4A4, W4A8 = "ours_w4a4", "ours_w4a8"
# ours with the bytes of a rival to spend, and the planner's choice at the bytes of the paper's two hand-written lists
PLAN_AT_RIVAL, PLAN_A8_AT_RIVAL = "plan_at_svdquant_bytes", "plan_a8_at_svdquant_bytes"
BRANCH_AT_RIVAL, CALIBRATED_AT_RIVAL = "ours_w4a4_r16", "ours_w4a4_r16_gptq"
PLAN_AT_PAPER, PLAN_AT_MIXED = "plan_at_paper_bytes", "plan_at_mixed_bytes"

Found = Mapping[str, Mapping[str, Any]]  # {method: {case: figure}}


def below(ours: float, other: float) -> float:
    """The share by which ours is smaller."""
    return 1 - ours / other


def above(ours: float, other: float) -> float:
    """By how much ours is larger."""
    return ours - other


@dataclass(frozen=True)
class Check:
    """`method`'s `case` against that of `other`: their gain is at least `least`. `bytes_too`: in no more bytes."""

    method: str
    other: str
    case: str
    least: float
    gain: Callable[[float, float], float] = below
    bytes_too: bool = True

    def measured(self, found: Found) -> str:
        """Both figures, the gain and whether it is enough; empty where this run does not have both methods."""
        ours, other = found.get(self.method, {}), found.get(self.other, {})
        if self.case not in ours or self.case not in other:
            return ""
        gain = self.gain(ours[self.case], other[self.case])
        met = gain >= self.least
        if self.gain is below:
            said = f"{ours[self.case]:.3f} against {other[self.case]:.3f}, {abs(gain):.1%} {_side(gain, 'below')}"
        else:
            said = f"{ours[self.case]:.2f} dB against {other[self.case]:.2f}, {abs(gain):.2f} dB {_side(gain, 'above')}"
        if self.bytes_too and "bytes" in ours and "bytes" in other:
            # scales and headers are no budget: half a percent is the same bytes
            met = met and ours["bytes"] <= 1.005 * other["bytes"]
            said += f", in {ours['bytes'] / 1e6:.1f} against {other['bytes'] / 1e6:.1f} MB"
        if ours.get("emulated"):
            return f"{said}; emulated: meets no bar"
        return f"{said} {MET if met else MISSED}"


def _side(gain: float, word: str) -> str:
    return word if gain >= 0 else {"below": "above", "above": "below"}[word]


@dataclass(frozen=True)
class Bar:
    """A line of the table: every check at every step count. `synthetic`: on generated layers of FLUX's shapes."""

    what: str
    bar: str
    checks: Sequence[Check]
    synthetic: bool = False


BARS = (
    Bar(
        "W4A4 on generated layers of FLUX's shapes, the paper's bytes",
        "median relative L2 at least 25 % below the paper's",
        [Check(W4A4, PAPER, "layer_l2_median", 0.25)], synthetic=True,
    ),
    Bar(
        "W4A8 on generated layers of FLUX's shapes, the paper's bytes",
        "median relative L2 at least 45 % below the paper's",
        [Check(W4A8, PAPER, "layer_l2_median", 0.45)], synthetic=True,
    ),
    Bar(
        "W4A4 on mini-flux, the paper's bytes",
        "median relative L2 at least 12 % below the paper's, PSNR at least 1 dB above",
        [Check(W4A4, PAPER, "layer_l2_median", 0.12), Check(W4A4, PAPER, "psnr_db", 1.0, above)],
    ),
    Bar(
        "W4A8 on mini-flux, the paper's bytes",
        "median relative L2 at least 35 % below the paper's",
        [Check(W4A8, PAPER, "layer_l2_median", 0.35)],
    ),
    Bar(
        "ours with the bytes of SVDQuant-style, spent on a branch of rank 16",
        "no larger error, no lower PSNR",
        [Check(BRANCH_AT_RIVAL, RIVAL, "layer_l2_median", 0.0), Check(BRANCH_AT_RIVAL, RIVAL, "psnr_db", 0.0, above)],
    ),
    Bar(
        "the same, calibrated, as SVDQuant-style is",
        "no larger error, no lower PSNR",
        [
            Check(CALIBRATED_AT_RIVAL, RIVAL, "layer_l2_median", 0.0),
            Check(CALIBRATED_AT_RIVAL, RIVAL, "psnr_db", 0.0, above),
        ],
    ),
    Bar(
        "the same bytes spent by the planner on W8A8 layers",
        "no larger error, no lower PSNR",
        [Check(PLAN_AT_RIVAL, RIVAL, "layer_l2_median", 0.0), Check(PLAN_AT_RIVAL, RIVAL, "psnr_db", 0.0, above)],
    ),
    Bar(
        "the same with 8-bit activations (on Hopper as fast), W4A8 and W8A8",
        "no larger error, no lower PSNR",
        [Check(PLAN_A8_AT_RIVAL, RIVAL, "layer_l2_median", 0.0), Check(PLAN_A8_AT_RIVAL, RIVAL, "psnr_db", 0.0, above)],
    ),
    Bar(
        "the planner's list at the bytes of the paper's W4A4 list",
        "less error, higher PSNR",
        [Check(PLAN_AT_PAPER, PAPER, "layer_l2_median", 0.0), Check(PLAN_AT_PAPER, PAPER, "psnr_db", 0.0, above)],
    ),
    Bar(
        "the planner's list at the bytes of the paper's mixed list",
        "less error, higher PSNR",
        [Check(PLAN_AT_MIXED, MIXED, "layer_l2_median", 0.0), Check(PLAN_AT_MIXED, MIXED, "psnr_db", 0.0, above)],
    ),
)  # fmt: skip


def quality_bars_table(rows: Rows) -> str:
    """Each bar, and what the committed rows say of it."""
    measured, generated = mini_flux(rows), all_seeds(synthetic(rows))
    if not measured and not generated:
        return "No quality runs are committed yet."
    lines = ["| what | bar | measured |", "| --- | --- | --- |"]
    for bar in BARS:
        groups = by_shape(generated if bar.synthetic else measured).values()
        said = [text for group in groups if (text := _said(bar, group))]
        lines.append(f"| {bar.what} | {bar.bar} | {'; '.join(said) or 'not measured'} |")
    return "\n".join([head([*measured, *generated]), "", *lines])


def _said(bar: Bar, rows: Rows) -> str:
    found = figures(rows)
    parts = [text for check in bar.checks if (text := check.measured(found))]
    steps = rows[0]["shape"].get("steps")
    return (f"{steps} steps: " if steps else "") + ", ".join(parts) if parts else ""
