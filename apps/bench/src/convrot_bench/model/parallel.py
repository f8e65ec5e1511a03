"""FLUX.1-dev on several GPUs: each step shared by all (Ulysses, ring), and a replica on each; BF16 against ours.

Rows of N GPUs are in ms a step, for replicas over all of them together. Efficiency is the time of one GPU over N times
that of N, each side run as it is fastest. What a shared step differs by from one GPU's is set against what compiling
does to our layers, run one by one. The processes are in ranks.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import BF16, OURS, UNFUSED, shape_of
from convrot_bench.model.ranks import ALONE, COMPILED_ALONE, GRAPH, REPLICAS, RING, ULYSSES, Group, work
from convrot_bench.model.sides import COMPILED, EAGER, Contender, facts
from convrot_bench.model.step import best
from convrot_bench.model.timing import Spread, is_gpu, versus
from convrot_bench.results import Figure

CPU_PROCESSES = 2
CASES = {EAGER: "eager", COMPILED: "compiled", GRAPH: "graph"}
Spreads = dict[Contender, Spread]


@dataclass
class Found:
    """What the processes have written down."""

    spreads: dict[str, Spreads] = field(default_factory=dict)  # of ALONE, REPLICAS, ULYSSES, RING
    distances: dict[str, dict[str, float]] = field(default_factory=dict)  # of ULYSSES, RING, COMPILED_ALONE, by side
    refused: list[str] = field(default_factory=list)


def parallel(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """On all GPUs that there are; on a CPU two processes. Where one fails, what was measured before still counts."""
    size = torch.cuda.device_count() if is_gpu(bench.device) else CPU_PROCESSES
    if size < 2:
        raise ValueError(f"it needs two GPUs or more, and torch sees {size}")
    with TemporaryDirectory() as folder:
        group = Group(size, bench.device, bench.backends, scale, Path(folder))
        try:
            multiprocessing.spawn(work, (group,), nprocs=size)
        except ProcessException as error:
            bench.refuse(f"parallel: a process failed: {str(error).strip().splitlines()[-1]}")
        found = read(group.notes)
    for reason in found.refused:
        bench.refuse(reason)
    yield from figures(found, size, scale, facts(bench, scale, fused=build.can_fuse()))


def read(notes: Path) -> Found:
    """The lines of the processes; none where they have not come so far."""
    found = Found()
    for line in notes.read_text().splitlines() if notes.exists() else ():
        note = json.loads(line)
        if "refused" in note:
            found.refused.append(note["refused"])
        elif "distance" in note:
            found.distances.setdefault(note["what"], {})[note["side"]] = note["distance"]
        else:
            contender = Contender(note["side"], note["how"])
            found.spreads.setdefault(note["what"], {})[contender] = Spread(**note["spread"])
    return found


def figures(found: Found, size: int, scale: Scale, more: dict[str, Any]) -> Iterator[Figure]:
    """Of each way: every mode that both sides have, the fastest of each, the efficiency, the distance."""
    shape = shape_of(scale.side) | {"gpus": size}
    for way in (ULYSSES, RING):
        spreads, errors = found.spreads.get(way, {}), found.distances.get(way, {})
        fields = more | ({"relative_l2": errors[OURS], "baseline_relative_l2": errors[BF16]} if errors else {})
        for how, name in CASES.items():
            ours, baseline = Contender(OURS, how), Contender(BF16, how)
            if ours in spreads and baseline in spreads:
                modes = fields | {"how": how, "baseline_how": how}
                yield versus(f"flux_{way}_{name}", shape, spreads[ours], spreads[baseline], f"BF16, {way}", modes)
        yield from _best(f"flux_{way}", shape, spreads, found.spreads.get(ALONE, {}), fields, f"BF16, {way}")
        yield from _distance(f"flux_{way}_distance", shape, errors, found.distances.get(COMPILED_ALONE, {}), more)
    replicas, alone = found.spreads.get(REPLICAS, {}), found.spreads.get(ALONE, {})
    yield from _best("flux_replicas", shape, replicas, alone, more, "BF16, a replica on each")


def _best(
    case: str, shape: dict[str, Any], spreads: Spreads, alone: Spreads, more: dict[str, Any], name: str
) -> Iterator[Figure]:
    """The fastest mode of each side on all GPUs, and how much of N times one GPU's speed it has."""
    fastest = {side: best(spreads, [c for c in spreads if c.side == side]) for side in (OURS, BF16)}
    single = {side: best(alone, [c for c in alone if c.side == side]) for side in (OURS, BF16)}
    if None in (*fastest.values(), *single.values()):
        return
    ours, baseline = fastest[OURS], fastest[BF16]
    more = more | {"how": ours.how, "baseline_how": baseline.how}
    more |= {"one_gpu": alone[single[OURS]].median * 1e3, "baseline_one_gpu": alone[single[BF16]].median * 1e3}
    yield versus(case, shape, spreads[ours], spreads[baseline], name, more)
    shares = {s: alone[single[s]].median / spreads[fastest[s]].median / shape["gpus"] for s in (OURS, BF16)}
    yield Figure(f"{case}_efficiency", shape, shares[OURS], shares[BF16], "share", name, more)


def _distance(
    case: str, shape: dict[str, Any], shared: dict[str, float], compiled: dict[str, float], more: dict[str, Any]
) -> Iterator[Figure]:
    if OURS in shared and compiled.get(UNFUSED):
        more = more | {"fused_compiled": compiled.get(OURS)}
        name = "compiled from eager, layer by layer on one GPU"
        yield Figure(case, shape, shared[OURS], compiled[UNFUSED], "relative_l2", name, more)
