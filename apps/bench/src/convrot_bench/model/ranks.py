"""The processes of the table parallel: one a GPU, each with both models.

Each builds and quantizes once; what it shares or compiles later are copies that have the same weights. The first one
times its models by itself while the others wait; then all time their replicas at once; then all share every step, by
Ulysses and by the ring. What is measured is written down at once, for parallel.py to make rows of.
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
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import flux_sides, step_inputs
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
    capture,
    check_finite,
    release,
)
from convrot_bench.model.timing import Rounds, Spread, is_gpu, time_rounds
from convrot_bench.ops.gates import relative_l2

ALONE, REPLICAS, ULYSSES, RING, COMPILED_ALONE = "alone", "replicas", "ulysses", "ring", "compiled alone"
GRAPHS = {mode: GRAPH_OF + mode for mode in (EAGER, COMPILED)}
# a ring needs a kernel that says the logarithm of its sums; the native one does not
ATTENTION = {ULYSSES: "native", RING: "_native_cudnn"}
STEPS = 5  # timed a round: six models are to be timed in two minutes
TIMEOUT = timedelta(seconds=120)  # of waiting for the others, who may compile for a quarter of it
PAIR = (BF16, OURS)
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
    phase: Phases

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
    if rank == 0:
        group.phase(f"{group.size} processes have started")
    backend, store = "nccl" if group.on_gpus else "gloo", f"file://{group.folder / 'store'}"
    distributed.init_process_group(backend, store, TIMEOUT, rank=rank, world_size=group.size)
    with torch.no_grad(), _counted(group):
        here = Rank(rank, group)
        one_gpu = here.alone()
        for way in (ULYSSES, RING) if group.on_gpus else (ULYSSES,):
            here.share(way, one_gpu)
        here.phase("done")
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
        sides = flux_sides(self.bench, group.scale, self.phase, BF16, UNFUSED)
        self._sources = {name: side.model for name, side in sides.items()}  # nothing is ever run, hooked or compiled

    def phase(self, what: str) -> None:
        """What comes now, said by the first process."""
        if self.is_first:
            self.group.phase(what)

    def alone(self) -> dict[str, Tensor]:
        """Without the others, then at the same time as they; the eager output of each side."""
        self.phase(ALONE)
        sides = self._sides(*PAIR)
        outs = {name: self._checked(side, ALONE) for name, side in sides.items()}
        steps: Steps = {}
        spreads: Spreads = {}
        for some in self._ways(sides, ALONE):
            steps |= some
            mine = time_rounds(some, self.bench.device, self.group.rounds) if self.is_first else {}
            found = self._gather(mine)[0]  # who is not first waits here
            self._write_spreads(ALONE, found)
            spreads |= found
        self.phase(REPLICAS)
        fastest = [min((c for c in spreads if c.side == s), key=lambda c: spreads[c].median) for s in sides]
        replicas = time_rounds({c: steps[c] for c in fastest}, self.bench.device, self.group.rounds)
        self._write_spreads(REPLICAS, together(self._gather(replicas)))
        self._note(over=REPLICAS)
        if self.group.on_gpus:
            self.phase(COMPILED_ALONE)
            if Contender(OURS, COMPILED) in steps:
                self._note_compiled(sides[OURS], outs[OURS])
            self._compile_unfused(sides[OURS].inputs)
        return outs

    def share(self, way: str, one_gpu: dict[str, Tensor]) -> None:
        """Every step by all processes."""
        self.phase(way)
        sides = self._sides(*PAIR)
        config = self.group.shared(way)  # one for both: every mesh has communicators of its own
        for name, side in sides.items():
            side.model.set_attention_backend(ATTENTION[way])
            side.model.enable_parallelism(config=config)
            self._note(what=way, side=name, distance=relative_l2(self._checked(side, way), one_gpu[name]))
        for steps in self._ways(sides, way):
            spreads = self._gather(time_rounds(steps, self.bench.device, self.group.rounds))
            self._write_spreads(way, {c: max((s[c] for s in spreads), key=lambda s: s.median) for c in steps})
        self._note(over=way)

    def _sides(self, *names: str) -> dict[str, Side]:
        """Copies that nothing has been done to; those before them are gone, with what was compiled for them."""
        torch._dynamo.reset()
        release()
        copied = {
            BF16: lambda: build.shell(self._sources[BF16]),
            UNFUSED: lambda: build.shell(self._sources[UNFUSED]),
            OURS: lambda: build.fused_copy(self._sources[UNFUSED]),
        }
        models = {name: copied[name]() for name in names}
        return {name: Side(name, m, step_inputs(self.bench, self.group.scale, m)) for name, m in models.items()}

    def _checked(self, side: Side, what: str, mode: str = EAGER) -> Tensor:
        out = waited(side, mode)().clone()
        check_finite(f"{what}: {side.name}, {mode}", out)
        return out

    def _ways(self, sides: dict[str, Side], what: str) -> Iterator[Steps]:
        """Steps of both sides, one way after the other: eager and, on GPUs, compiled and as graphs."""
        yield {Contender(name, EAGER): waited(side, EAGER) for name, side in sides.items()}
        if self.group.on_gpus:
            self.phase(f"{what}: compiling")
            compiled = self._compiled(sides, what)
            yield compiled
            self.phase(f"{what}: capturing graphs")
            yield self._graphs([Contender(name, EAGER) for name in sides] + list(compiled), sides, what)

    def _compiled(self, sides: dict[str, Side], what: str) -> Steps:
        steps: Steps = {}
        for name, side in sides.items():
            if self._attempt(f"{what}: {name}, {COMPILED}", partial(side.compile, self.bench.device)) is not None:
                steps[Contender(name, COMPILED)] = waited(side, COMPILED)
        return steps

    def _graphs(self, runs: list[Contender], sides: dict[str, Side], what: str) -> Steps:
        """What runs, each as one CUDA graph."""
        steps: Steps = {}
        for name, mode in runs:
            graph = GRAPHS[mode]
            replay = self._attempt(f"{what}: {name}, {graph}", partial(capture, waited(sides[name], mode)))
            if replay is not None:
                check_finite(f"{what}: {name}, {graph}", replay())
                steps[Contender(name, graph)] = replay
        return steps

    def _compile_unfused(self, inputs: dict[str, Any]) -> None:
        """What compiling does to our layers, run one by one."""
        side = Side(UNFUSED, build.shell(self._sources[UNFUSED]), inputs)
        eager = self._checked(side, COMPILED_ALONE)
        if self._attempt(f"{COMPILED_ALONE}: {UNFUSED}", partial(side.compile, self.bench.device)) is not None:
            self._note_compiled(side, eager)

    def _note_compiled(self, side: Side, eager: Tensor) -> None:
        """How far a side's compiled step on one GPU is from its eager one."""
        distance = relative_l2(self._checked(side, COMPILED_ALONE, COMPILED), eager)
        self._note(what=COMPILED_ALONE, side=side.name, distance=distance)

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
