"""One FLUX.1-dev step at 1024 x 1024: eager, compiled, CUDA graphs; bytes of weights, peak, seconds of compiling."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import MODEL, flux_sides, shape_of
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
)
from convrot_bench.model.timing import Spread, is_gpu, time_rounds, versus
from convrot_bench.ops.gates import relative_l2
from convrot_bench.results import Figure

# case -> ours, baseline
PAIRS = {
    "flux_step_compiled": (Contender(OURS, COMPILED), Contender(BF16, COMPILED)),
    "flux_step_compiled_vs_eager": (Contender(OURS, COMPILED), Contender(BF16, EAGER)),
    "flux_step_eager": (Contender(OURS, EAGER), Contender(BF16, EAGER)),
    "flux_step_compiled_unfused": (Contender(UNFUSED, COMPILED), Contender(BF16, COMPILED)),
    "flux_step_eager_unfused": (Contender(UNFUSED, EAGER), Contender(BF16, EAGER)),
}
Steps = dict[Contender, Callable[[], Tensor]]


def step(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """All of it in one process, every contender in every round."""
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    phase = Phases("step")
    sides = flux_sides(bench, scale, phase, BF16, OURS, UNFUSED)
    more = facts(bench, scale, fused=build.is_fused(sides[OURS].model))
    yield _weights(sides, bench, more)
    outs = {side.name: _checked(side, EAGER) for side in sides.values()}
    more["relative_l2"] = relative_l2(outs[OURS], outs[BF16])
    eager_peaks = peaks(sides, EAGER, bench.device)
    phase("compiling")
    with fresh_cache():  # compiling starts from nothing on the disk
        yield _compile(sides, bench, scale, more)
        if is_gpu(bench.device):
            yield _peak(eager_peaks, peaks(sides, COMPILED, bench.device), shape_of(scale.side), more)
        steps: Steps = {Contender(s.name, mode): s.bind(mode) for s in sides.values() for mode in (EAGER, COMPILED)}
        phase("capturing graphs")
        for name in (BF16, OURS):
            steps |= graphs(bench, sides[name], (EAGER, COMPILED))
        phase(f"timing {len(steps)} ways to run")
        spreads = time_rounds(steps, bench.device, scale.rounds)
    yield from step_figures(spreads, shape_of(scale.side), more)


def _checked(side: Side, mode: str) -> Tensor:
    out = side.step(mode)
    check_finite(f"{side.name}, {mode}", out)
    return out


def _weights(sides: dict[str, Side], bench: Bench, more: dict[str, Any]) -> Figure:
    ours, theirs = (build.weight_bytes(sides[name].model) for name in (OURS, BF16))
    if is_gpu(bench.device):
        more = more | {"allocated": sides[OURS].held, "baseline_allocated": sides[BF16].held}
    return Figure("flux_weights", {"model": MODEL}, ours, theirs, "bytes", "BF16", more)


def _compile(sides: dict[str, Side], bench: Bench, scale: Scale, more: dict[str, Any]) -> Figure:
    """Seconds of each side's first compiled step, by a compiler that has started before.

    Ours goes first: what both sides have in common is cached for the second.
    """
    if is_gpu(bench.device):
        torch.compile(torch.square)(torch.ones(64, device=bench.device))
    seconds = {name: sides[name].compile(bench.device) for name in (OURS, BF16, UNFUSED)}
    for side in sides.values():
        _checked(side, COMPILED)
    shape, more = shape_of(scale.side), more | {"unfused": seconds[UNFUSED]}
    return Figure("flux_compile_seconds", shape, seconds[OURS], seconds[BF16], "s", "BF16", more)


def peaks(sides: dict[str, Side], mode: str, device: str) -> dict[str, int]:
    """Bytes at the most during each side's step as if it were alone on the GPU: what other models hold is left out."""
    found = {}
    for side in sides.values() if is_gpu(device) else ():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        side.step(mode)
        torch.cuda.synchronize()
        others = sum(other.held for other in sides.values() if other is not side)
        found[side.name] = torch.cuda.max_memory_allocated() - others
    return found


def _peak(eager: dict[str, int], compiled: dict[str, int], shape: dict[str, Any], more: dict[str, Any]) -> Figure:
    more = more | {"how": COMPILED, "eager": eager[OURS], "baseline_how": COMPILED, "baseline_eager": eager[BF16]}
    more |= {"unfused": compiled[UNFUSED], "unfused_eager": eager[UNFUSED]}
    return Figure("flux_peak", shape, compiled[OURS], compiled[BF16], "bytes", "BF16", more)


def step_figures(spreads: dict[Contender, Spread], shape: dict[str, Any], more: dict[str, Any]) -> Iterator[Figure]:
    """A figure for every pair that was timed, and one for the fastest graph of each side."""
    pairs = dict(PAIRS)
    captured = [c for c in spreads if c.how.startswith(GRAPH_OF)]
    fastest = {side: best(spreads, [c for c in captured if c.side == side]) for side in (OURS, BF16)}
    if fastest[OURS] and fastest[BF16]:
        pairs["flux_step_graph"] = (fastest[OURS], fastest[BF16])
    for case, (ours, baseline) in pairs.items():
        if ours in spreads and baseline in spreads:
            fused = more["fused"] and ours.side != UNFUSED
            fields = more | {"fused": fused, "how": ours.how, "baseline_how": baseline.how}
            yield versus(case, shape, spreads[ours], spreads[baseline], f"BF16 {baseline.how}", fields)


def best(spreads: dict[Contender, Spread], among: list[Contender]) -> Any:
    """The fastest of them, or None of none."""
    return min(among, key=lambda c: spreads[c].median, default=None)
