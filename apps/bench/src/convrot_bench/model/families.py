"""One step of other models at 1024 x 1024, layers swapped one by one: what a model without fused blocks gets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import BF16, OURS, release, shape_of
from convrot_bench.model.inputs import MakeInputs, qwen_inputs, sd3_inputs
from convrot_bench.model.sides import COMPILED, EAGER, Contender, Side, built, check_finite, facts, quantized
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
    sides = [family_side(bench, scale, one, name) for name in (BF16, OURS)]
    outs = [side.step() for side in sides]
    for side, out in zip(sides, outs, strict=True):
        check_finite(f"{one.model}, {side.name}", out)
    more = facts(bench, scale, fused=False, relative_l2=relative_l2(outs[1], outs[0]))
    theirs, ours = (build.weight_bytes(side.model) for side in sides)
    yield Figure(f"{one.key}_weights", {"model": one.model}, ours, theirs, "bytes", "BF16", more)
    for side in sides:
        side.compile(bench.device)
        check_finite(f"{one.model}, {side.name}, compiled", side.step(COMPILED))
    steps = {Contender(side.name, mode): side.bind(mode) for mode in (EAGER, COMPILED) for side in sides}
    spreads = time_rounds(steps, bench.device, scale.rounds)
    for mode, baseline_mode in ((COMPILED, COMPILED), (EAGER, EAGER), (COMPILED, EAGER)):
        case = f"{one.key}_step_{mode}" + ("" if mode == baseline_mode else f"_vs_{baseline_mode}")
        pair = spreads[Contender(OURS, mode)], spreads[Contender(BF16, baseline_mode)]
        fields = more | {"how": mode, "baseline_how": baseline_mode}
        yield versus(case, shape_of(scale.side), *pair, f"BF16 {baseline_mode}", fields)


def family_side(bench: Bench, scale: Scale, one: Family, name: str) -> Side:
    """BF16 or OURS, from the same weights."""

    def make() -> Any:
        return build.transformer(one.kind, getattr(scale, one.key), bench.device)

    maker = make if name == BF16 else quantized(make, fuse=False)
    side = built(name, maker, lambda m: one.inputs(m, scale, bench.device, scale.side, scale.side, 1), bench.device)
    release()
    return side
