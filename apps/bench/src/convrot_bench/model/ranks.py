"""The processes of the table parallel: one a GPU, each with both models.

The first one times its models by itself while the others wait; then all time their replicas at once; then all share
every step, by Ulysses and by the ring. What is measured is written down at once, for parallel.py to read.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh

from convrot_bench.bench import ERRORS, Bench
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import BF16, OURS, UNFUSED, flux_side, release
from convrot_bench.model.sides import COMPILED, EAGER, GRAPH_OF, Contender, Side, capture, check_finite
from convrot_bench.model.timing import Rounds, Spread, is_gpu, time_rounds
from convrot_bench.ops.gates import relative_l2

ALONE, REPLICAS, ULYSSES, RING, COMPILED_ALONE = "alone", "replicas", "ulysses", "ring", "compiled alone"
GRAPH = GRAPH_OF + EAGER
# a ring needs a kernel that says the logarithm of its sums; the native one does not
ATTENTION = {ULYSSES: "native", RING: "_native_cudnn"}
STEPS = 5  # timed a round: six models are to be timed in two minutes
TIMEOUT = timedelta(seconds=120)  # of waiting for the others, who may compile for a quarter of it
Steps = dict[Contender, Callable[[], Tensor]]
Spreads = dict[Contender, Spread]
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Group:
    """What the processes of a run have in common."""

    size: int
    device: str
    backends: tuple[str, ...]
    scale: Scale
    folder: Path

    @property
    def on_gpus(self) -> bool:
        """Whether there are graphs, compiled code and rings."""
        return is_gpu(self.device)

    @property
    def notes(self) -> Path:
        """The file that the first process writes."""
        return self.folder / "notes.jsonl"

    @property
    def rounds(self) -> Rounds:
        """Of the scale, with fewer steps."""
        return replace(self.scale.rounds, warmup=1, steps=min(self.scale.rounds.steps, STEPS))

    def shared(self, way: str) -> Any:
        """diffusers' ContextParallelConfig over all processes."""
        from diffusers import ContextParallelConfig

        config = ContextParallelConfig(**{f"{way}_degree": self.size})
        kind = torch.device(self.device).type  # diffusers would take GPUs wherever torch is built for them
        config.mesh = init_device_mesh(kind, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
        return config


def work(rank: int, group: Group) -> None:
    """All of one process."""
    from diffusers.utils import logging

    if group.on_gpus:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    logging.set_verbosity_error()  # parallelism is experimental, diffusers says, for each model
    backend, store = "nccl" if group.on_gpus else "gloo", f"file://{group.folder / 'store'}"
    distributed.init_process_group(backend, store, TIMEOUT, rank=rank, world_size=group.size)
    with torch.no_grad(), _counted(group):
        here = Rank(rank, group)
        one_gpu = here.alone()
        for way in (ULYSSES, RING) if group.on_gpus else (ULYSSES,):
            here.share(way, one_gpu)
    release()  # graphs go before what they call
    distributed.destroy_process_group()


@contextmanager
def _counted(group: Group) -> Iterator[None]:
    """diffusers takes the rank modulo the number of accelerators, which is 0 on a CPU."""
    if group.on_gpus:
        yield
        return
    with patch.object(torch.accelerator, "device_count", lambda: group.size):
        yield


class Rank:
    """One process: what it measures, alone or with all others."""

    def __init__(self, rank: int, group: Group) -> None:
        self.group, self.is_first = group, rank == 0
        self.bench = Bench(f"cuda:{rank}" if group.on_gpus else "cpu", group.backends)
        self._objects = distributed.new_group(backend="gloo", timeout=TIMEOUT)  # also to wait without using the GPU

    def alone(self) -> dict[str, Tensor]:
        """Without the others, then at the same time as they; the eager output of each side."""
        sides = self._sides()
        outs = {name: self._checked(side, ALONE) for name, side in sides.items()}
        steps = self._fast(sides, ALONE)
        if self.group.on_gpus:
            self._note_compiled(sides[OURS], outs[OURS])
            steps |= self._graphs(sides, ALONE)
        mine = time_rounds(steps, self.bench.device, self.group.rounds) if self.is_first else {}
        spreads = self._gather(mine)[0]  # who is not first waits here
        self._write_spreads(ALONE, spreads)
        fastest = [min((c for c in spreads if c.side == s), key=lambda c: spreads[c].median) for s in sides]
        replicas = time_rounds({c: steps[c] for c in fastest}, self.bench.device, self.group.rounds)
        self._write_spreads(REPLICAS, together(self._gather(replicas)))
        return outs

    def share(self, way: str, one_gpu: dict[str, Tensor]) -> None:
        """Every step by all processes."""
        sides = self._sides()
        for name, side in sides.items():
            side.model.set_attention_backend(ATTENTION[way])
            side.model.enable_parallelism(config=self.group.shared(way))
            self._note(what=way, side=name, distance=relative_l2(self._checked(side, way), one_gpu[name]))
        self._time(way, self._fast(sides, way))
        if self.group.on_gpus:
            self._time(way, self._graphs(sides, way))

    def _sides(self) -> dict[str, Side]:
        """Both models anew; the memory of older ones is free again."""
        torch._dynamo.reset()
        release()
        return {name: flux_side(self.bench, self.group.scale, name) for name in (BF16, OURS)}

    def _checked(self, side: Side, what: str, mode: str = EAGER) -> Tensor:
        out = waited(side, mode)().clone()
        check_finite(f"{what}: {side.name}, {mode}", out)
        return out

    def _fast(self, sides: dict[str, Side], what: str) -> Steps:
        """Eager and, on GPUs, compiled steps."""
        steps: Steps = {Contender(name, EAGER): waited(side, EAGER) for name, side in sides.items()}
        for name, side in sides.items() if self.group.on_gpus else ():
            if self._attempt(f"{what}: {name}, {COMPILED}", partial(side.compile, self.bench.device)) is not None:
                steps[Contender(name, COMPILED)] = waited(side, COMPILED)
        return steps

    def _graphs(self, sides: dict[str, Side], what: str) -> Steps:
        """Each side's eager step as one CUDA graph."""
        steps: Steps = {}
        for name, side in sides.items():
            replay = self._attempt(f"{what}: {name}, {GRAPH}", partial(capture, waited(side, EAGER)))
            if replay is not None:
                check_finite(f"{what}: {name}, {GRAPH}", replay())
                steps[Contender(name, GRAPH)] = replay
        return steps

    def _note_compiled(self, ours: Side, eager: Tensor) -> None:
        """How far compiled steps are from eager ones on one GPU: of our model, and of its layers one by one."""
        unfused = flux_side(self.bench, self.group.scale, UNFUSED)
        outs = {OURS: eager, UNFUSED: self._checked(unfused, COMPILED_ALONE)}
        for side in (ours, unfused):
            if self._attempt(f"{COMPILED_ALONE}: {side.name}", partial(side.compile, self.bench.device)) is not None:
                distance = relative_l2(self._checked(side, COMPILED_ALONE, COMPILED), outs[side.name])
                self._note(what=COMPILED_ALONE, side=side.name, distance=distance)

    def _time(self, what: str, steps: Steps) -> None:
        spreads = self._gather(time_rounds(steps, self.bench.device, self.group.rounds))
        self._write_spreads(what, {c: max((s[c] for s in spreads), key=lambda s: s.median) for c in steps})

    def _attempt(self, label: str, make: Callable[[], Thing]) -> Thing | None:
        """What all processes can make, or None and a note where one cannot: they have to agree on what runs next."""
        made, reason = None, ""
        try:
            made = make()
        except ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
        reasons = [one for one in self._gather(reason) if one]
        if reasons:
            self._note(refused=f"{label}: {reasons[0]}")
        return None if reasons else made

    def _gather(self, mine: Thing) -> list[Thing]:
        """What every process has, in the order of ranks."""
        found: list[Any] = [None] * self.group.size
        distributed.all_gather_object(found, mine, group=self._objects)
        return found

    def _note(self, **values: Any) -> None:
        if self.is_first:
            with self.group.notes.open("a") as f:
                f.write(json.dumps(values) + "\n")

    def _write_spreads(self, what: str, spreads: Spreads) -> None:
        for contender, spread in spreads.items():
            self._note(what=what, **contender._asdict(), spread=asdict(spread))


def waited(side: Side, mode: str) -> Callable[[], Tensor]:
    """A step that ends with what it gathers: a graph has to hold that too."""

    def step() -> Tensor:
        out = side.step(mode)
        return out.wait() if isinstance(out, AsyncCollectiveTensor) else out

    return step


def together(replicas: list[Spreads]) -> Spreads:
    """Seconds a step of all replicas together, from those of each."""

    def of(spreads: list[Spread]) -> Spread:
        median, p10, p90 = (1 / sum(1 / getattr(s, name) for s in spreads) for name in ("median", "p10", "p90"))
        return Spread(median, p10, p90, spreads[0].runs)

    return {contender: of([one[contender] for one in replicas]) for contender in replicas[0]}
