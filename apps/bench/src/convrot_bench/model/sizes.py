"""The FLUX.1-dev step at other sizes and batches: compiled, and the best of ours against the best of BF16."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from convrot_bench.bench import ERRORS, Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import flux_sides, shape_of
from convrot_bench.model.inputs import flux_inputs
from convrot_bench.model.phases import Phases
from convrot_bench.model.sides import (
    BF16,
    COMPILED,
    EAGER,
    OURS,
    Contender,
    Side,
    check_finite,
    facts,
    graphs,
    release,
)
from convrot_bench.model.step import Steps, best, peaks
from convrot_bench.model.timing import Rounds, Spread, time_rounds, timed_once, versus
from convrot_bench.results import Figure

GRAPHED_BELOW = 0.3  # seconds a step: longer ones keep the GPU busy, and a graph has nothing to win
ALL = Rounds(rounds=2)
LONG, LONG_ROUNDS = 2.0, Rounds(rounds=2, warmup=1, steps=3)  # where a step takes more than so many seconds
Sides = dict[str, Side]


def sizes(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """Every size and batch; one that does not fit the memory is said, and the next goes on."""
    phase = Phases("sizes")
    sides = flux_sides(bench, scale, phase, BF16, OURS)
    more = facts(bench, scale, fused=build.is_fused(sides[OURS].model))
    for size, batch in product(scale.sizes, scale.batches):
        phase(f"{size} x {size}, batch {batch}")
        try:
            yield from _one(bench, scale, sides, shape_of(size, batch), more)
        except ERRORS as error:
            bench.refuse(f"flux_step_best at {size} x {size}, batch {batch}: {error}")
        release()


def _one(bench: Bench, scale: Scale, sides: Sides, shape: dict[str, Any], more: dict[str, Any]) -> Iterator[Figure]:
    steps, seconds, most = _steps(bench, scale, sides, shape)
    if most:
        more = more | {"peak": most[OURS], "baseline_peak": most[BF16]}
    spreads = time_rounds(steps, bench.device, rounds_for(seconds, scale.rounds))
    compiled = [Contender(name, COMPILED) for name in (OURS, BF16)]
    if shape != shape_of(scale.side):  # the table `step` has that one
        yield _figure("flux_step_compiled", shape, spreads, compiled, more)
    fastest = [best(spreads, [c for c in spreads if c.side == name]) for name in (OURS, BF16)]
    yield _figure("flux_step_best", shape, spreads, fastest, more)


def _steps(bench: Bench, scale: Scale, sides: Sides, shape: dict[str, Any]) -> tuple[Steps, float, dict[str, int]]:
    """What is timed at this shape, checked; the seconds of the longer side's compiled step; both sides' peaks."""
    torch._dynamo.reset()  # else the second shape would be compiled for any shape
    steps: Steps = {}
    for side in sides.values():
        side.inputs = flux_inputs(side.model, scale, bench.device, *shape.values())
        side.compile(bench.device)
        steps[Contender(side.name, COMPILED)] = side.bind(COMPILED)
    most = peaks(sides, COMPILED, bench.device)  # before graphs keep memory of their own
    seconds = max(_checked_seconds(side, shape) for side in sides.values())
    for side in sides.values():
        if seconds < GRAPHED_BELOW:
            steps |= graphs(bench, side, (EAGER, COMPILED))
    return steps, seconds, most


def _checked_seconds(side: Side, shape: dict[str, Any]) -> float:
    """Of one step, whose output is finite."""
    seconds, out = timed_once(side.bind(COMPILED))
    check_finite(f"{side.name} at {shape}", out)
    return seconds


def rounds_for(seconds: float, rounds: Rounds) -> Rounds:
    """Two rounds: there are many shapes. Of fewer steps where one takes long."""
    return rounds.at_most(LONG_ROUNDS if seconds > LONG else ALL)


def _figure(
    case: str, shape: dict[str, Any], spreads: dict[Contender, Spread], pair: list[Contender], more: dict[str, Any]
) -> Figure:
    ours, baseline = pair
    fields = more | {"how": ours.how, "baseline_how": baseline.how}
    return versus(case, shape, spreads[ours], spreads[baseline], "BF16", fields)
