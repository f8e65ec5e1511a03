"""What attention with 8-bit operands gains: our FLUX.1-dev step with fp8_attention_, against that without, and BF16."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import flux_sides, shape_of
from convrot_bench.model.inputs import flux_inputs
from convrot_bench.model.phases import Phases
from convrot_bench.model.sides import (
    BF16,
    COMPILED,
    EAGER,
    GRAPH_OF,
    OURS,
    UNFUSED,
    Contender,
    Side,
    check_finite,
    facts,
    graphs,
    release,
)
from convrot_bench.model.timing import time_rounds, versus
from convrot_bench.ops.attention import versions
from convrot_bench.ops.gates import relative_l2
from convrot_bench.results import Figure
from convrot_quant import fp8_attention_

WITH = "ours, attention in 8 bits"
GRAPH = GRAPH_OF + COMPILED
CASE = "fp8_attention"
Pairs = Mapping[str, tuple[Contender, Contender]]
# case -> ours, baseline
PAIRS: Pairs = {
    CASE: (Contender(WITH, EAGER), Contender(OURS, EAGER)),
    f"{CASE}_compiled": (Contender(WITH, COMPILED), Contender(OURS, COMPILED)),
    f"{CASE}_graph": (Contender(WITH, GRAPH), Contender(OURS, GRAPH)),
    f"{CASE}_eager_vs_bf16": (Contender(WITH, EAGER), Contender(BF16, EAGER)),
    f"{CASE}_compiled_vs_bf16": (Contender(WITH, COMPILED), Contender(BF16, COMPILED)),
    f"{CASE}_compiled_vs_bf16_eager": (Contender(WITH, COMPILED), Contender(BF16, EAGER)),
    f"{CASE}_graph_vs_bf16": (Contender(WITH, GRAPH), Contender(BF16, GRAPH)),
}
# of images twice as high and wide, where attention is most of a step and a graph has nothing to win
LARGE = {case: PAIRS[case] for case in (f"{CASE}_compiled", f"{CASE}_compiled_vs_bf16")}


def attention(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """Three models from the same weights; eager, compiled and as CUDA graphs of compiled steps, at two sizes."""
    phase = Phases("attention")
    sides = flux_sides(bench, scale, phase, BF16, UNFUSED)
    quantized = sides.pop(UNFUSED)
    sides |= {name: Side(name, build.fused_copy(quantized.model), quantized.inputs) for name in (OURS, WITH)}
    del quantized
    fp8_attention_(sides[WITH].model)
    for size, pairs in ((scale.side, PAIRS), (2 * scale.side, LARGE)):
        yield from _at(bench, scale, sides, size, pairs, phase)
        release()


def _at(bench: Bench, scale: Scale, sides: dict[str, Side], size: int, pairs: Pairs, phase: Phases) -> Iterator[Figure]:
    torch._dynamo.reset()  # else the second size would be compiled for any size
    wanted = {contender for pair in pairs.values() for contender in pair}
    steps: dict[Contender, Callable[[], Tensor]] = {}
    outs: dict[str, Tensor] = {}
    for name, side in sides.items():
        phase(f"{size} x {size}, compiling {name}")
        side.inputs = flux_inputs(side.model, scale, bench.device, size, size, 1)
        outs[name] = side.step()
        side.compile(bench.device)
        for out in (outs[name], side.step(COMPILED)):
            check_finite(name, out)
        steps |= {Contender(name, mode): side.bind(mode) for mode in (EAGER, COMPILED)}
        if Contender(name, GRAPH) in wanted:
            steps |= graphs(bench, side, (COMPILED,))
    steps = {contender: step for contender, step in steps.items() if contender in wanted}
    phase(f"{size} x {size}, timing {len(steps)} ways to run")
    spreads = time_rounds(steps, bench.device, scale.rounds)
    more: dict[str, Any] = facts(bench, scale, fused=build.is_fused(sides[WITH].model)) | versions()
    more["relative_l2"] = relative_l2(outs[WITH], outs[BF16])
    more["baseline_relative_l2"] = relative_l2(outs[OURS], outs[BF16])  # of ours without it, in every row
    for case, (ours, baseline) in pairs.items():
        if ours in spreads and baseline in spreads:
            fields = more | {"how": ours.how, "baseline_how": baseline.how}
            named = "BF16" if baseline.side == BF16 else "ours, attention in 16 bits"
            yield versus(case, shape_of(size), spreads[ours], spreads[baseline], named, fields)
