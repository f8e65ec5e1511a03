"""The FLUX.1-dev step at other sizes and batches: compiled, and the best of ours against the best of BF16."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from convrot_bench.bench import ERRORS, Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import BF16, OURS, flux_side, release, shape_of
from convrot_bench.model.inputs import flux_inputs
from convrot_bench.model.sides import COMPILED, EAGER, Contender, Side, check_finite, facts, graphs
from convrot_bench.model.step import Steps, best, peaks
from convrot_bench.model.timing import Rounds, Spread, time_once, time_rounds, versus
from convrot_bench.results import Figure

GRAPHED_BELOW = 0.3  # seconds a step: longer ones keep the GPU busy, and a graph has nothing to win
ROUNDS = 2
LONG, LONG_STEPS = 1.0, 5  # seconds a step, and how many of them are timed a round


def sizes(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """Every size and batch; one that does not fit the memory is said, and the next goes on."""
    sides = [flux_side(bench, scale, name) for name in (BF16, OURS)]
    more = facts(bench, scale, fused=build.is_fused(sides[1].model))
    for size, batch in product(scale.sizes, scale.batches):
        try:
            yield from _one(bench, scale, sides, shape_of(size, batch), more)
        except ERRORS as error:
            bench.refuse(f"flux_step_best at {size} x {size}, batch {batch}: {error}")
        release()


def _one(
    bench: Bench, scale: Scale, sides: list[Side], shape: dict[str, Any], more: dict[str, Any]
) -> Iterator[Figure]:
    steps, seconds, most = _steps(bench, scale, sides, shape)
    if most:
        more = more | {"peak": most[OURS], "baseline_peak": most[BF16]}
    spreads = time_rounds(steps, bench.device, rounds_for(seconds, scale.rounds))
    compiled = [Contender(name, COMPILED) for name in (OURS, BF16)]
    if shape != shape_of(scale.side):  # the table `step` has that one
        yield _figure("flux_step_compiled", shape, spreads, compiled, more)
    fastest = [best(spreads, [c for c in spreads if c.side == name]) for name in (OURS, BF16)]
    yield _figure("flux_step_best", shape, spreads, fastest, more)


def _steps(bench: Bench, scale: Scale, sides: list[Side], shape: dict[str, Any]) -> tuple[Steps, float, dict[str, int]]:
    """What is timed at this shape, checked; the seconds of the longer side's compiled step; both sides' peaks."""
    torch._dynamo.reset()  # else the second shape would be compiled for any shape
    steps: Steps = {}
    seconds = 0.0
    for side in sides:
        side.inputs = flux_inputs(side.model, scale, bench.device, *shape.values())
        side.compile(bench.device)
        check_finite(f"{side.name} at {shape}", side.step(COMPILED))
        steps[Contender(side.name, COMPILED)] = side.bind(COMPILED)
        seconds = max(seconds, time_once(side.bind(COMPILED)))
    most = peaks({side.name: side for side in sides}, COMPILED, bench.device)  # before graphs keep memory of their own
    for side in sides:
        if seconds < GRAPHED_BELOW:
            steps |= graphs(bench, side, (EAGER, COMPILED))
    return steps, seconds, most


def rounds_for(seconds: float, rounds: Rounds) -> Rounds:
    """Two rounds: there are many shapes. Of fewer steps where one takes long."""
    short = replace(rounds, rounds=ROUNDS)
    return replace(short, warmup=1, steps=LONG_STEPS) if seconds > LONG else short


def _figure(
    case: str, shape: dict[str, Any], spreads: dict[Contender, Spread], pair: list[Contender], more: dict[str, Any]
) -> Figure:
    ours, baseline = pair
    fields = more | {"how": ours.how, "baseline_how": baseline.how}
    return versus(case, shape, spreads[ours], spreads[baseline], "BF16", fields)
