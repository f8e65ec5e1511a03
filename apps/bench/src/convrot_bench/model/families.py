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
from convrot_bench.model.sides import BF16, COMPILED, EAGER, OURS, Contender, Side, check_finite, facts, sides_from
from convrot_bench.model.timing import time_rounds, versus
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
    """Eager and compiled, and the bytes of the weights."""
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
    steps = {Contender(side.name, mode): side.bind(mode) for mode in (EAGER, COMPILED) for side in sides.values()}
    phase("timing")
    spreads = time_rounds(steps, bench.device, scale.rounds)
    for mode, baseline_mode in ((COMPILED, COMPILED), (EAGER, EAGER), (COMPILED, EAGER)):
        case = f"{one.key}_step_{mode}" + ("" if mode == baseline_mode else f"_vs_{baseline_mode}")
        pair = spreads[Contender(OURS, mode)], spreads[Contender(BF16, baseline_mode)]
        fields = more | {"how": mode, "baseline_how": baseline_mode}
        yield versus(case, shape_of(scale.side), *pair, f"BF16 {baseline_mode}", fields)


def family_sides(bench: Bench, scale: Scale, one: Family, phase: Tell) -> dict[str, Side]:
    """BF16 and OURS, from the same weights."""

    def make() -> Any:
        return build.transformer(one.kind, getattr(scale, one.key), bench.device)

    def make_inputs(model: Any) -> Inputs:
        return one.inputs(model, scale, bench.device, scale.side, scale.side, 1)

    return sides_from(make, make_inputs, (BF16, OURS), bench.device, phase)
