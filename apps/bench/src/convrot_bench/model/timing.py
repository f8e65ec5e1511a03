"""Contenders timed in turns: every round takes each, so that a drift of clocks and power meets all of them alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from statistics import median
from typing import Any, TypeVar

import torch

from convrot_bench.results import Figure

EVENTS = "cuda events, steps back to back"
WALL = "wall clock, each waited for"
FACTORS = {"ms": 1e3, "s": 1.0, "s/image": 1.0}
Key = TypeVar("Key")
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Rounds:
    """How often each contender runs: `warmup` untimed and `steps` timed in each of `rounds`."""

    rounds: int = 3
    warmup: int = 2
    steps: int = 10

    def at_most(self, other: "Rounds") -> "Rounds":
        """The smaller of each number."""
        return Rounds(*(min(pair) for pair in zip(astuple(self), astuple(other), strict=True)))


QUICK = Rounds(rounds=3, warmup=1, steps=5)
QUICK_IMAGES = Rounds(rounds=3, warmup=0, steps=1)


@dataclass(frozen=True)
class Spread:
    """Seconds: median, 10th and 90th percentile of `runs` samples."""

    median: float
    p10: float
    p90: float
    runs: int


def spread_of(samples: Sequence[float]) -> Spread:
    """Percentiles are samples, not means between two of them."""
    ranked = sorted(samples)
    last = len(ranked) - 1
    return Spread(median(ranked), ranked[round(0.1 * last)], ranked[round(0.9 * last)], len(ranked))


def timing_of(device: str) -> str:
    """How time_rounds takes the time by itself."""
    return EVENTS if is_gpu(device) else WALL


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def time_rounds(
    contenders: Mapping[Key, Callable[[], Any]], device: str, plan: Rounds, *, wall: bool = False
) -> dict[Key, Spread]:
    """{name: step} -> {name: seconds a step}. `wall`: by the clock on the wall on a GPU too, waiting for each step."""
    clock = _time_events if is_gpu(device) and not wall else _time_wall
    samples: dict[Key, list[float]] = {name: [] for name in contenders}
    for _ in range(plan.rounds):
        for name, step in contenders.items():
            for _ in range(plan.warmup):
                step()
            samples[name] += clock(step, plan.steps)
    return {name: spread_of(values) for name, values in samples.items()}


def _time_events(step: Callable[[], Any], times: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def _time_wall(step: Callable[[], Any], times: int) -> list[float]:
    return [time_once(step) for _ in range(times)]


def time_once(step: Callable[[], Any]) -> float:
    """Seconds of one call by the clock on the wall, from an idle GPU to an idle GPU."""
    return timed_once(step)[0]


def timed_once(step: Callable[[], Thing]) -> tuple[float, Thing]:
    """The same, and what it returned."""
    _wait()
    start = time.perf_counter()
    made = step()
    _wait()
    return time.perf_counter() - start, made


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def versus(
    case: str, shape: dict[str, Any], ours: Spread, baseline: Spread, name: str, more: dict[str, Any], unit: str = "ms"
) -> Figure:
    """Two spreads as one figure of the unit."""
    factor = FACTORS[unit]
    spreads = {"p10": ours.p10, "p90": ours.p90, "baseline_p10": baseline.p10, "baseline_p90": baseline.p90}
    more = {key: seconds * factor for key, seconds in spreads.items()} | {"runs": ours.runs} | more
    return Figure(case, shape, ours.median * factor, baseline.median * factor, unit, name, more)
