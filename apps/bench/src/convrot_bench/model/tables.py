"""The tables of `convrot-bench model`: which there are, what each measures, which of them are asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from convrot_bench.bench import Bench, Job
from convrot_bench.model.attention import attention
from convrot_bench.model.branch import branch
from convrot_bench.model.breakdown import breakdown
from convrot_bench.model.configs import REAL, TINY, Scale
from convrot_bench.model.conversion import conversion
from convrot_bench.model.families import FAMILIES, family
from convrot_bench.model.loading import loading
from convrot_bench.model.lora import lora
from convrot_bench.model.parallel import parallel
from convrot_bench.model.peers import PEERS, peers
from convrot_bench.model.pipeline import pipeline
from convrot_bench.model.sizes import sizes
from convrot_bench.model.step import step
from convrot_bench.model.timing import QUICK, QUICK_IMAGES
from convrot_bench.model.vram import vram
from convrot_bench.results import Figure

Measure = Callable[[Bench, Scale], Iterator[Figure]]
# table -> label -> what is measured together
TABLES: dict[str, dict[str, Measure]] = {
    "step": {"step": step},
    "sizes": {"sizes": sizes},
    "peers": {"peers": peers},
    "families": {one.model: partial(family, one=one) for one in FAMILIES},
    "pipeline": {"pipeline": pipeline},
    "breakdown": {"breakdown": breakdown},
    "loading": {"loading": loading},
    "lora": {"lora": lora},
    "branch": {"branch": branch},
    "attention": {"attention": attention},
    "conversion": {"conversion": conversion},
    "vram": {"vram": vram},
    "parallel": {"parallel": parallel},
}


def select(
    device: str,
    *,
    tiny: bool,
    quick: bool = False,
    sizes: Sequence[int] = (),
    batches: Sequence[int] = (),
    peers: Sequence[str] = (),
) -> Scale:
    """What to measure on the device: all of a scale, or these sizes, batches and peers of it; quick: half as often."""
    if torch.device(device).type != "cuda" and not tiny:
        raise ValueError(f"model: real sizes need a GPU, got device {device}; use --tiny to try the commands here")
    if unknown := [name for name in peers if name not in (known := [peer.name for peer in PEERS])]:
        raise ValueError(f"model: unknown peer {unknown[0]!r}; use some of {', '.join(known)}")
    if odd := [size for size in sizes if size % 16 or size < 16]:
        raise ValueError(f"model: a size must be a positive multiple of 16 pixels, got {odd[0]}")
    scale = TINY if tiny else REAL
    if quick:
        scale = replace(scale, rounds=scale.rounds.at_most(QUICK), images=scale.images.at_most(QUICK_IMAGES))
    chosen = replace(scale, sizes=tuple(sizes) or scale.sizes, batches=tuple(batches) or scale.batches)
    return replace(chosen, peers=tuple(peers))


def plan(scale: Scale, tables: Sequence[str]) -> list[Job]:
    """The jobs of the named tables, or of all that this machine has the GPUs for, in order."""
    if unknown := [name for name in tables if name not in TABLES]:
        raise ValueError(f"model: unknown table {unknown[0]!r}; use some of {', '.join(TABLES)}")
    several = scale.tiny or torch.cuda.device_count() > 1
    chosen = tables or [name for name in TABLES if name != "parallel" or several]
    return [
        _job(label, measure, scale)
        for name, parts in TABLES.items()
        if name in chosen
        for label, measure in parts.items()
    ]


def _job(label: str, measure: Measure, scale: Scale) -> Job:
    return Job(label, lambda bench: measure(bench, scale))
