"""What a low-rank branch costs: our FLUX.1-dev step with rank 16 beside every W4A4 layer, against that without."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import flux_sides, shape_of
from convrot_bench.model.phases import Phases
from convrot_bench.model.sides import (
    BF16,
    COMPILED,
    EAGER,
    GRAPH_OF,
    Contender,
    Side,
    check_finite,
    facts,
    graphs,
)
from convrot_bench.model.timing import time_rounds, versus
from convrot_bench.ops.gates import relative_l2
from convrot_bench.results import Figure

RANK = 16
PLAIN, WITH = "ours", f"ours with a branch of rank {RANK}"
PRESETS = {PLAIN: "ours", WITH: f"ours-r{RANK}"}
# case -> how both run, the side that it is compared with
CASES = {
    f"branch_rank{RANK}": (EAGER, PLAIN),
    f"branch_rank{RANK}_compiled": (COMPILED, PLAIN),
    f"branch_rank{RANK}_graph": (GRAPH_OF + COMPILED, PLAIN),
    f"branch_rank{RANK}_vs_bf16": (COMPILED, BF16),
}


def branch(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """Three models from the same weights; eager, compiled and as CUDA graphs."""
    torch._dynamo.reset()
    phase = Phases("branch")
    sides = flux_sides(bench, scale, phase, BF16)
    for name, preset in PRESETS.items():
        phase(f"quantizing: {name}")
        model = build.fused_copy(build.quantized_copy(sides[BF16].model, preset))
        sides[name] = Side(name, model, sides[BF16].inputs)
    steps: dict[Contender, Callable[[], Tensor]] = {}
    outs: dict[str, Tensor] = {}
    for name, side in sides.items():
        phase(f"compiling {name}")
        outs[name] = side.step()
        check_finite(name, outs[name])
        side.compile(bench.device)
        steps |= {Contender(name, mode): side.bind(mode) for mode in (EAGER, COMPILED)}
        steps |= graphs(bench, side, (COMPILED,))
    more = facts(bench, scale, fused=build.is_fused(sides[WITH].model), rank=RANK)
    more["weight_bytes"], more["relative_l2"] = (
        build.weight_bytes(sides[WITH].model),
        relative_l2(outs[WITH], outs[BF16]),
    )
    phase(f"timing {len(steps)} ways to run")
    spreads = time_rounds(steps, bench.device, scale.rounds)
    for case, (how, other) in CASES.items():
        ours, baseline = Contender(WITH, how), Contender(other, how)
        if ours in spreads and baseline in spreads:
            fields = more | {"how": how, "baseline_how": how}
            named = "BF16" if other == BF16 else "ours without a branch"
            yield versus(case, shape_of(scale.side), spreads[ours], spreads[baseline], named, fields)
