"""Mixed precision by a budget: which scheme each layer gets, so that bytes or time are spent where errors are largest.

Every unit (a layer, or layers that a fused block multiplies as one) has options, from the cheapest scheme to 16 bits.
Steps along the lower convex hulls of (cost, error) are taken in the order of error removed per cost: after each of them
no plan of the same cost has a smaller error. Steps that no longer fit are left out for smaller ones after them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import nn

from convrot_quant.budgets import Budget, Cost, too_small
from convrot_quant.config import QuantConfig, Scheme
from convrot_quant.fuse import stacked_layers
from convrot_quant.patch import plan
from convrot_quant.plans import LayerPlan, Plan
from convrot_quant.rules import linears, matches
from convrot_quant.scores import Scores, model_weights, schemes_of, weight_scores

LADDER = ("W4A4", "W8A8", "16")
SIXTEEN = "16"  # of a ladder: layers may stay in 16 bits
# The preset that says how layers get a scheme, modulation and scale rules included
PRESET_OF = {
    "W4A4": "ours", "W4A4-R16": "ours-r16", "W4A4-R32": "ours-r32", "W4A8": "w4a8", "W4A8-R16": "w4a8-r16",
    "W4A8-R32": "w4a8-r32", "W4A16": "w4a16", "W8A8": "w8a8", "W8A16": "w8a16",
}  # fmt: skip
Seconds = Callable[[LayerPlan], float]


@dataclass(frozen=True)
class Option:
    """One way to hold a unit's layers, its cost, and its error: weighted squares, summed over the layers."""

    schemes: Mapping[str, Scheme | None]
    cost: Cost
    error: float


@dataclass(frozen=True)
class Unit:
    """Layers that get one rung of the ladder together; `name` is the first one's."""

    name: str
    options: tuple[Option, ...]


def scheme_names(schemes: Sequence[str]) -> list[str]:
    """The names that a ladder is made of, checked, in capitals, each once."""
    names = list(dict.fromkeys(scheme.strip().upper() for scheme in schemes))
    if not set(names) <= {*PRESET_OF, SIXTEEN} or not set(names) - {SIXTEEN}:
        known = ", ".join((*PRESET_OF, SIXTEEN))
        raise ValueError(f"a ladder has one or more of {known}, and not 16 alone; got {', '.join(schemes)}")
    return names


@dataclass(frozen=True)
class Ladder:
    """The plans that are mixed, one a scheme, and whether layers may stay in 16 bits.

    `fixed`: layers that overrides have decided; they have one option.
    """

    rungs: tuple[Plan, ...]
    sixteen: bool
    fixed: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        schemes: Sequence[str] = LADDER,
        keep: Sequence[str] = (),
        overrides: Mapping[str, Scheme] | None = None,
    ) -> Ladder:
        """From scheme names, and "16" for 16 bits; the model may be on the meta device.

        `keep` and `overrides` are those of a QuantConfig: they decide their layers before the budget does.
        """
        names = scheme_names(schemes)
        bases = [QuantConfig.preset(PRESET_OF[name]) for name in names if name != SIXTEEN]
        rungs = [
            plan(model, QuantConfig(base.scheme, {**base.overrides, **(overrides or {})}, tuple(keep)))
            for base in bases
        ]
        if not rungs[0]:
            reasons = "; ".join(sorted(set(rungs[0].reasons.values()))) or "it has no nn.Linear"
            raise ValueError(f"Ladder: nothing to quantize in {type(model).__name__}: {reasons}")
        fixed = {layer.name for layer in linears(model) if any(matches(layer, glob) for glob in overrides or ())}
        return cls(tuple(rungs), SIXTEEN in names, frozenset(fixed))

    def choices(self, names: Sequence[str]) -> list[dict[str, Scheme | None]]:
        """What these layers can be together, each once, in the ladder's order."""
        found: list[dict[str, Scheme | None]] = []
        for rung in self.rungs:
            schemes: dict[str, Scheme | None] = {name: rung[name] for name in names}
            if schemes not in found:
                found.append(schemes)
        return [*found, dict.fromkeys(names)] if self.sixteen and names[0] not in self.fixed else found


@dataclass(frozen=True)
class Problem:
    """Units with their options, and the cost of everything that no choice changes."""

    ladder: Ladder
    units: tuple[Unit, ...]
    rest: Cost
    scores: Scores

    @classmethod
    def of(
        cls,
        ladder: Ladder,
        scores: Scores,
        groups: Iterable[Sequence[str]] = (),
        seconds: Seconds = lambda layer: 0.0,
    ) -> Problem:
        """`groups`: layers that get one scheme (fuse.stacked_layers). `seconds`: the time of a layer as planned."""
        first = ladder.rungs[0]
        layers = {layer.name: layer for layer in first.planned}
        free = first.keys() - ladder.fixed
        together = {name: tuple(n for n in group if n in free) for group in groups for name in group}
        members = dict.fromkeys(together.get(name, (name,)) if name in free else (name,) for name in first)

        def cost(layer: LayerPlan) -> Cost:
            return Cost(layer.bytes_after, seconds(layer))

        def option(schemes: Mapping[str, Scheme | None]) -> Option:
            costs = (cost(replace(layers[name], scheme=scheme)) for name, scheme in schemes.items())
            return Option(schemes, sum(costs, Cost()), sum(scores.squared(name, s) for name, s in schemes.items()))

        units = tuple(Unit(names[0], tuple(map(option, ladder.choices(names)))) for names in members)
        kept = (cost(layer) for layer in first.planned if layer.name not in first)
        return cls(ladder, units, sum(kept, Cost(first.other_bytes)), scores)

    def plan(self, held: Iterable[Option]) -> Plan:
        """The options as a plan that `quantize` takes."""
        chosen = {name: scheme for option in held for name, scheme in option.schemes.items()}
        first = self.ladder.rungs[0]
        layers = [_planned(layer, chosen[layer.name]) if layer.name in chosen else layer for layer in first.planned]
        return Plan(layers, first.config, first.model_class, first.other_bytes)

    def cost(self, held: Iterable[Option]) -> Cost:
        """Of the whole transformer."""
        return sum((option.cost for option in held), self.rest)


def _planned(layer: LayerPlan, scheme: Scheme | None) -> LayerPlan:
    return replace(layer, scheme=scheme, note=layer.note if scheme else "16 bits by the budget")


@dataclass(frozen=True)
class _Step:
    """From one corner of a unit's hull to the next; `gain` is the error removed per share of the budget."""

    unit: str
    option: Option
    gain: float


def plan_within(
    model: nn.Module,
    budget: Budget | int,
    *,
    schemes: Sequence[str] = LADDER,
    keep: Sequence[str] = (),
    overrides: Mapping[str, Scheme] | None = None,
    group: bool = True,
    progress: bool = True,
) -> Plan:
    """A plan for a 16-bit model with the least error, by its weights alone, within a budget (an int: bytes).

    `group`: one scheme for layers that a fused block multiplies as one. The model is not changed.
    """
    limits = Budget(bytes=budget) if isinstance(budget, int) else budget
    if limits.seconds is not None:
        raise ValueError("plan_within: seconds depend on a machine: give bytes, or spend() a Problem with its seconds")
    ladder = Ladder.of(model, schemes, keep, overrides)
    groups = stacked_layers(model) if group else []
    check_budget(ladder, limits, groups, lambda layer: 0.0)
    scores = weight_scores(model_weights(model, ladder.rungs[0]), schemes_of(ladder.rungs), progress=progress)
    return spend(Problem.of(ladder, scores, groups), limits)


def check_budget(ladder: Ladder, budget: Budget, groups: Iterable[Sequence[str]], seconds: Seconds) -> None:
    """An error for a budget below the smallest plan, which no score changes: before anything is scored."""
    spend(Problem.of(ladder, Scores(defaultdict(float), defaultdict(float)), groups, seconds), budget)


def spend(problem: Problem, budget: Budget) -> Plan:
    """The plan of least error within a budget, to the last step that fits. Ties go by the layers' names."""
    hulls = {unit.name: _hull(unit.options, budget) for unit in problem.units}
    held = {name: hull[0] for name, hull in hulls.items()}
    total = problem.cost(held.values())
    if not total.fits(budget):
        raise ValueError(too_small(total, budget))
    filling = wide = False
    for step in _steps(hulls, budget):
        into_16_bits = None in step.option.schemes.values()
        # what is left over buys no 16 bits before their turn: next to nothing in error, and a block that is not fused
        if into_16_bits and filling and not wide:
            continue
        wide |= into_16_bits
        after = total - held[step.unit].cost + step.option.cost
        if after.fits(budget):
            held[step.unit], total = step.option, after
        else:
            filling = True
    return problem.plan(held.values())


def frontier(problem: Problem) -> list[tuple[int, float]]:
    """(bytes of the whole transformer, predicted error) after every step by bytes, from the smallest plan up."""
    budget = Budget(bytes=1)
    hulls = {unit.name: _hull(unit.options, budget) for unit in problem.units}
    held = {name: hull[0] for name, hull in hulls.items()}

    def point() -> tuple[int, float]:
        error = sum(option.error for option in held.values())
        return problem.cost(held.values()).bytes, math.sqrt(error / problem.scores.weight)

    points = [point()]
    for step in _steps(hulls, budget):
        held[step.unit] = step.option
        points.append(point())
    return points


def predicted_error(plan: Mapping[str, Scheme], scores: Scores) -> float:
    """Root of the weighted mean over the scored layers of the squared relative error; 0 with every layer in 16 bits."""
    total = sum(scores.squared(name, plan.get(name)) for name in scores.weights)
    return math.sqrt(total / scores.weight)


def _hull(options: Iterable[Option], budget: Budget) -> list[Option]:
    """Corners of the lower convex hull of (share of the budget, error), cheapest first."""
    corners: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost.share(budget), o.error)):
        if corners and option.error >= corners[-1].error:
            continue
        while len(corners) > 1 and _gain(corners[-2], corners[-1], budget) <= _gain(corners[-1], option, budget):
            corners.pop()
        corners.append(option)
    return corners


def _gain(cheap: Option, dear: Option, budget: Budget) -> float:
    return (cheap.error - dear.error) / (dear.cost.share(budget) - cheap.cost.share(budget))


def _steps(hulls: Mapping[str, Sequence[Option]], budget: Budget) -> list[_Step]:
    """All steps, the best first."""
    steps = []
    for name, hull in hulls.items():
        steps += [_Step(name, dear, _gain(cheap, dear, budget)) for cheap, dear in pairwise(hull)]
    return sorted(steps, key=lambda step: (-step.gain, step.unit))
