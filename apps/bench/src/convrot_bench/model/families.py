"""One step of other models at 1024 x 1024: what a model without fused blocks gets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import shape_of
from convrot_bench.model.inputs import Inputs, MakeInputs, qwen_inputs, sd3_inputs
from convrot_bench.model.phases import Phases, Tell
from convrot_bench.model.sides import (
    BF16,
    COMPILED,
    EAGER,
    GRAPH_OF,
    OURS,
    Contender,
    Side,
    check_finite,
    facts,
    graphs,
    release,
    sides_from,
)
from convrot_bench.model.step import Steps, best
from convrot_bench.model.timing import Spread, time_rounds, versus
from convrot_bench.ops.gates import relative_l2
from convrot_bench.results import Figure


@dataclass(frozen=True)
class Family:
    """A transformer that diffusers defines. `key` names its configuration in Scale, and begins its cases."""

    key: str
    model: str
    kind: str
    inputs: MakeInputs


FAMILIES = (
    Family("sd35_large", "SD3.5-large", "SD3Transformer2DModel", sd3_inputs),
    Family("qwen_image", "Qwen-Image", "QwenImageTransformer2DModel", qwen_inputs),
)


def family(bench: Bench, scale: Scale, one: Family) -> Iterator[Figure]:
    """Eager, compiled and as CUDA graphs, and the bytes of the weights."""
    torch._dynamo.reset()
    phase = Phases(one.model)
    sides = family_sides(bench, scale, one, phase)
    outs = {name: side.step() for name, side in sides.items()}
    for name, out in outs.items():
        check_finite(f"{one.model}, {name}", out)
    fused = build.is_fused(sides[OURS].model)
    more = facts(bench, scale, fused=fused, relative_l2=relative_l2(outs[OURS], outs[BF16]))
    ours, theirs = (build.weight_bytes(sides[name].model) for name in (OURS, BF16))
    yield Figure(f"{one.key}_weights", {"model": one.model}, ours, theirs, "bytes", "BF16", more)
    for side in sides.values():
        phase(f"compiling {side.name}")
        side.compile(bench.device)
        check_finite(f"{one.model}, {side.name}, compiled", side.step(COMPILED))
    steps: Steps = {
        Contender(side.name, mode): side.bind(mode) for mode in (EAGER, COMPILED) for side in sides.values()
    }
    phase("capturing graphs")
    for side in sides.values():
        release()  # a graph keeps memory of its own, which cannot be taken from what eager steps have left cached
        steps |= graphs(bench, side, (EAGER, COMPILED))
    phase(f"timing {len(steps)} ways to run")
    spreads = time_rounds(steps, bench.device, scale.rounds)
    yield from family_figures(one.key, spreads, shape_of(scale.side), more)


def family_figures(
    key: str, spreads: dict[Contender, Spread], shape: dict[str, Any], more: dict[str, Any]
) -> Iterator[Figure]:
    """A figure for every pair of modes, one for the fastest graph of each side, one for the fastest of all its ways."""
    pairs: dict[str, list[Any]] = {}
    for mode, baseline_mode in ((COMPILED, COMPILED), (EAGER, EAGER), (COMPILED, EAGER)):
        case = f"{key}_step_{mode}" + ("" if mode == baseline_mode else f"_vs_{baseline_mode}")
        pairs[case] = [Contender(OURS, mode), Contender(BF16, baseline_mode)]
    captured = [c for c in spreads if c.how.startswith(GRAPH_OF)]
    for case, among in ((f"{key}_step_graph", captured), (f"{key}_step_best", list(spreads))):
        pairs[case] = [best(spreads, [c for c in among if c.side == side]) for side in (OURS, BF16)]
    for case, (ours, baseline) in pairs.items():
        if ours and baseline:
            fields = more | {"how": ours.how, "baseline_how": baseline.how}
            yield versus(case, shape, spreads[ours], spreads[baseline], f"BF16 {baseline.how}", fields)


def family_sides(bench: Bench, scale: Scale, one: Family, phase: Tell) -> dict[str, Side]:
    """BF16 and OURS, from the same weights."""

    def make() -> Any:
        return build.transformer(one.kind, getattr(scale, one.key), bench.device)

    def make_inputs(model: Any) -> Inputs:
        return one.inputs(model, scale, bench.device, scale.side, scale.side, 1)

    return sides_from(make, make_inputs, (BF16, OURS), bench.device, phase)
