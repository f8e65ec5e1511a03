"""What a LoRA costs: our FLUX.1-dev step with a rank-16 adapter on every attention layer, against the same without."""

from collections.abc import Iterator

import torch

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import flux_sides, shape_of
from convrot_bench.model.phases import Phases
from convrot_bench.model.sides import EAGER, GRAPH_OF, UNFUSED, Contender, Side, check_finite, facts, graphs
from convrot_bench.model.timing import time_rounds, versus
from convrot_bench.results import Figure

RANK = 16
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
PLAIN, WITH = "ours", "ours with LoRA"


def lora(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """Two models from the same weights, one with the adapter; in eager mode and as CUDA graphs."""
    from peft import LoraConfig

    torch._dynamo.reset()
    phase = Phases("lora")
    quantized = flux_sides(bench, scale, phase, UNFUSED)[UNFUSED]
    sides = {name: Side(name, build.fused_copy(quantized.model), quantized.inputs) for name in (PLAIN, WITH)}
    del quantized
    torch.manual_seed(0)
    sides[WITH].model.add_adapter(LoraConfig(r=RANK, target_modules=list(ATTENTION), init_lora_weights=False))
    steps, more = {}, facts(bench, scale, fused=build.is_fused(sides[WITH].model), rank=RANK, layers=list(ATTENTION))
    for name, side in sides.items():
        phase(f"running {name}")
        check_finite(name, side.step())
        steps[Contender(name, EAGER)] = side.bind(EAGER)
        steps |= graphs(bench, side, (EAGER,))
    phase("timing")
    spreads = time_rounds(steps, bench.device, scale.rounds)
    for how, case in ((EAGER, f"lora_rank{RANK}"), (GRAPH_OF + EAGER, f"lora_rank{RANK}_graph")):
        ours, baseline = Contender(WITH, how), Contender(PLAIN, how)
        if ours in spreads and baseline in spreads:
            fields = more | {"how": how, "baseline_how": how}
            yield versus(case, shape_of(scale.side), spreads[ours], spreads[baseline], "ours without LoRA", fields)
