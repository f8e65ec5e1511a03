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
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import shape_of
from convrot_bench.model.phases import Phases
from convrot_bench.model.ranks import ALONE, COMPILED_ALONE, GRAPHS, REPLICAS, RING, ULYSSES, Group, work
from convrot_bench.model.sides import BF16, COMPILED, EAGER, OURS, UNFUSED, Contender, facts
from convrot_bench.model.step import best
from convrot_bench.model.timing import Spread, is_gpu, versus
from convrot_bench.results import Figure

CPU_PROCESSES = 2
LOOK = 1.0  # seconds between two looks at what the processes have written
CASES = {EAGER: "eager", COMPILED: "compiled", GRAPHS[EAGER]: "graph", GRAPHS[COMPILED]: "graph_compiled"}
Spreads = dict[Contender, Spread]


@dataclass
class Found:
    """What the processes have written down."""

    spreads: dict[str, Spreads] = field(default_factory=dict)  # of ALONE, REPLICAS, ULYSSES, RING
    distances: dict[str, dict[str, float]] = field(default_factory=dict)  # of ULYSSES, RING, COMPILED_ALONE, by side
    over: set[str] = field(default_factory=set)  # those of REPLICAS, ULYSSES, RING that were timed every way
    refused: list[str] = field(default_factory=list)


def parallel(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """On all GPUs that there are; on a CPU two processes. Where one fails, what was measured before still counts."""
    size = torch.cuda.device_count() if is_gpu(bench.device) else CPU_PROCESSES
    if size < 2:
        raise ValueError(f"it needs two GPUs or more, and torch sees {size}")
    more, told = facts(bench, scale, fused=True), set()
    with TemporaryDirectory() as folder:
        group = Group(size, bench.device, bench.backends, scale, Path(folder), Phases("parallel"))
        for found in _watched(bench, group):
            for figure in figures(found, size, scale, more):
                if figure.case not in told:
                    told.add(figure.case)
                    yield figure
    for reason in found.refused:
        bench.refuse(reason)


def _watched(bench: Bench, group: Group) -> Iterator[Found]:
    """Start the processes; what they have found up to now, again and again, and at their end."""
    processes = multiprocessing.spawn(work, (group,), nprocs=group.size, join=False)
    try:
        while not processes.join(timeout=LOOK):
            yield read(group.notes)
    except ProcessException as error:
        bench.refuse(f"parallel: a process failed: {str(error).strip().splitlines()[-1]}")
    finally:
        for process in processes.processes:
            if process.is_alive():  # nobody waits for rows any more
                process.terminate()
    found = read(group.notes)
    found.over |= {REPLICAS, ULYSSES, RING}  # there will be no more
    yield found


def read(notes: Path) -> Found:
    """The whole lines of the processes; none where they have not come so far."""
    found = Found()
    text = notes.read_text() if notes.exists() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        note = json.loads(line)
        if "over" in note:
            found.over.add(note["over"])
        elif "refused" in note:
            found.refused.append(note["refused"])
        elif "distance" in note:
            found.distances.setdefault(note["what"], {})[note["side"]] = note["distance"]
        else:
            contender = Contender(note["side"], note["how"])
            found.spreads.setdefault(note["what"], {})[contender] = Spread(**note["spread"])
    return found


def figures(found: Found, size: int, scale: Scale, more: dict[str, Any]) -> Iterator[Figure]:
    """Of each way: every mode that both sides have, the distance; once it is over the fastest, the efficiency."""
    shape = shape_of(scale.side) | {"gpus": size}
    for way in (ULYSSES, RING):
        spreads, errors = found.spreads.get(way, {}), found.distances.get(way, {})
        fields = more | _errors(errors)
        for how, name in CASES.items():
            ours, baseline = Contender(OURS, how), Contender(BF16, how)
            if ours in spreads and baseline in spreads:
                modes = fields | {"how": how, "baseline_how": how}
                yield versus(f"flux_{way}_{name}", shape, spreads[ours], spreads[baseline], f"BF16, {way}", modes)
        yield from _distance(f"flux_{way}_distance", shape, errors, found.distances.get(COMPILED_ALONE, {}), more)
        if way in found.over:
            yield from _best(f"flux_{way}", shape, spreads, found.spreads.get(ALONE, {}), fields, f"BF16, {way}")
    if REPLICAS in found.over:
        replicas, alone = found.spreads.get(REPLICAS, {}), found.spreads.get(ALONE, {})
        yield from _best("flux_replicas", shape, replicas, alone, more, "BF16, a replica on each")


def _errors(distances: dict[str, float]) -> dict[str, Any]:
    if not {OURS, BF16} <= distances.keys():
        return {}
    return {"relative_l2": distances[OURS], "baseline_relative_l2": distances[BF16]}


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
