"""What `convrot plan` says of a plan: lines for people, figures for programs, the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convrot_quant.budgets import Budget, decimal_size
from convrot_quant.latency import Workload
from convrot_quant.pareto import Point, draw_plot
from convrot_quant.planner import Problem, frontier, predicted_error
from convrot_quant.plans import Plan


@dataclass(frozen=True)
class Result:
    """A plan with what it was made for."""

    budget: Budget
    workload: Workload
    prompts: Sequence[str]
    problem: Problem
    plan: Plan

    @property
    def point(self) -> Point:
        """Bytes of the whole transformer and predicted error."""
        return self.plan.bytes_after, predicted_error(self.plan, self.problem.scores)

    @property
    def seconds(self) -> float:
        """Of the linears in one step, by the table of rates."""
        return sum(map(self.workload.seconds, self.plan.layers))

    def lines(self, groups: Sequence[Sequence[str]], unfused: Sequence[str]) -> list[str]:
        """What to say below the table."""
        size, error = self.point
        lines = [f"predicted error {error:.4f} (scored {self._scored()}), {decimal_size(size)} of {self._limits()}"]
        if self.budget.seconds is not None:
            lines.append(f"linears of a step: {self.seconds * 1e3:.1f} ms ({self.workload.machine.about})")
        if not self.plan:
            lines.append("the budget holds every layer in 16 bits: there is nothing to quantize")
        elif unfused:
            lines.append(
                f"{len(unfused)} block(s) will not run fused, since layers of theirs stay in 16 bits: "
                "--schemes without 16 keeps them fast"
            )
        if groups:
            lines.append(
                f"{len(groups)} groups of layers read one input each and get one scheme: a fused block quantizes that "
                "input once and multiplies them as one (--no-group lets each have its own)"
            )
        return lines

    def _scored(self) -> str:
        count = len(self.prompts)
        return f"on {count} prompt{'s' * (count > 1)}" if count else "by the weights alone"

    def _limits(self) -> str:
        limits = [] if self.budget.bytes is None else [decimal_size(self.budget.bytes)]
        return " and ".join([*limits, *([] if self.budget.seconds is None else [f"{self.budget.seconds * 1e3:g} ms"])])

    def to_dict(self) -> dict[str, Any]:
        """The figures and the plan, ready for JSON; `components` is what quantize --plan reads."""
        size, error = self.point
        entry = {"bytes_before": self.plan.bytes_before, "bytes_after": size, "plan": self.plan.to_dict()}
        return {
            "budget": {"bytes": self.budget.bytes, "seconds": self.budget.seconds},
            "scored_on": list(self.prompts) or "weights",
            "predicted_error": error,
            "seconds": self.seconds,
            "components": {"transformer": entry},
        }

    def draw(self, path: Path, marks: Mapping[str, Plan]) -> dict[str, Any]:
        """Plot the frontier with other plans at their own bytes; its points for JSON."""
        points = {name: (made.bytes_after, predicted_error(made, self.problem.scores)) for name, made in marks.items()}
        curve = frontier(self.problem)
        title = f"{self.plan.model_class}: bits by budget, scored {self._scored()}"
        draw_plot(path, title, curve, points, self.point)
        return {"file": str(path), "curve": curve, "presets": points}
