"""Where one FLUX.1-dev step goes: the time of every kernel by torch.profiler, summed by the kind of work it does."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from convrot_bench.bench import Bench, GateError
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import flux_sides, shape_of
from convrot_bench.model.kernels import GAPS, OTHER, classify, sums
from convrot_bench.model.phases import Phases
from convrot_bench.model.sides import BF16, COMPILED, EAGER, OURS, Side, check_finite, facts
from convrot_bench.model.timing import Spread, is_gpu, spread_of, time_once, versus
from convrot_bench.results import Figure

PROFILED = 3  # steps
WAITED = 10  # steps by the clock on the wall, each alone as a profiled one is
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace that are the GPU's time
LARGEST = 5  # kernels of no known kind, to be named in the row
WALL = "profiled kernels; the step by the clock on the wall, each waited for"
Durations = dict[str, float]


def breakdown(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """A row for both sides, eager and compiled; the baseline is BF16's step run the same way."""
    torch._dynamo.reset()
    phase = Phases("breakdown")
    sides = flux_sides(bench, scale, phase, BF16, OURS)
    more = facts(bench, scale, fused=build.is_fused(sides[OURS].model), timing=WALL)
    for mode in (EAGER, COMPILED):
        walls: dict[str, Spread] = {}
        for side in sides.values():
            phase(f"{side.name}, {mode}")
            if mode == COMPILED:
                side.compile(bench.device)
            check_finite(f"{side.name}, {mode}", side.step(mode))
            walls[side.name], kinds = _measure(side, mode, bench.device)
            fields = more | kinds | {"how": mode, "baseline_how": mode}
            pair = walls[side.name], walls[BF16]
            yield versus(f"breakdown/{side.name}_{mode}", shape_of(scale.side), *pair, f"BF16 {mode}", fields)


def _measure(side: Side, mode: str, device: str) -> tuple[Spread, dict[str, Any]]:
    """The step's time, and the fields that say where it goes: milliseconds a kind, and of how many kernels."""
    step = side.bind(mode)
    wall = spread_of([time_once(step) for _ in range(WAITED)])
    durations, count = kernel_durations(step, device)
    return wall, parts(wall.median * 1e3, durations) | {"kernels": count}


def parts(wall: float, durations: Durations) -> dict[str, Any]:
    """Milliseconds of the step and of each of its kernels -> a field a kind, and the largest kernels of none."""
    fields: dict[str, Any] = sums(durations)
    fields[GAPS] = max(0.0, wall - sum(durations.values()))
    unknown = Counter({name: ms for name, ms in durations.items() if classify(name) == OTHER})
    return fields | {"unknown": {name[:120]: ms for name, ms in unknown.most_common(LARGEST)}}


def kernel_durations(step: Callable[[], Any], device: str) -> tuple[Durations, int]:
    """{kernel: milliseconds a step}, and kernels a step. On a CPU: ops, the time of each without what it calls."""
    if not is_gpu(device):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        averages = profiler.key_averages()
        return {e.key: e.self_cpu_time_total / 1e3 for e in averages}, sum(e.count for e in averages)
    with profile(activities=[ProfilerActivity.CUDA]):  # the first start of a profiler takes long
        step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        durations, count = traced(json.loads(path.read_text()), PROFILED)
    if not durations:
        raise GateError("torch.profiler saw no kernel of the step; let this process use CUPTI")
    return durations, count


def traced(trace: dict[str, Any], steps: int) -> tuple[Durations, int]:
    """A trace's events -> {kernel: milliseconds a step}, and kernels a step. Ranges that users mark are none."""
    events = [event for event in trace["traceEvents"] if event.get("cat") in KERNELS]
    total: Counter[str] = Counter()
    for event in events:
        total[event["name"]] += event["dur"] / 1e3 / steps
    return dict(total), len(events) // steps
