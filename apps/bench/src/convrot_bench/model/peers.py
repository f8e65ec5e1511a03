"""The FLUX.1-dev step of other projects from the same weights, in one process with ours; each runs its best way.

A peer that is not installed or does not run has a row too: without a figure, with its error.
"""

import copy
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from convrot_bench.bench import PEER_ERRORS, Bench, first_line
from convrot_bench.model import build, peer_layers
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import flux_sides, make_flux, shape_of
from convrot_bench.model.peer_layers import linear_of, swapper
from convrot_bench.model.phases import Phases
from convrot_bench.model.sides import (
    BF16,
    COMPILED,
    EAGER,
    OURS,
    Contender,
    Side,
    allocated,
    check_finite,
    facts,
    release,
)
from convrot_bench.model.step import best
from convrot_bench.model.timing import Rounds, is_gpu, time_rounds, versus
from convrot_bench.ops.gates import gate_peer, relative_l2
from convrot_bench.ops.problems import Source
from convrot_bench.results import Figure
from convrot_quant import plan

TRIAL = Rounds(rounds=1, warmup=1, steps=3)  # by which the faster way of a side is chosen
GATE_ROWS = 32  # of the inputs on which a peer's layers are compared with the 16-bit ones
PATIENCE = 200  # seconds for a peer's first step, compiled or not: both sets of layers within the 10 minutes of a table
AGAIN = 5  # seconds


@dataclass(frozen=True)
class Peer:
    """What replaces the linears. Its case is peer_<name>; `package` as pip knows it, `module` as Python does."""

    name: str
    title: str
    package: str
    module: str
    swap: Callable[[nn.Module, Sequence[str]], None]


_KITCHEN, _TORCHAO = ("comfy-kitchen", "comfy_kitchen"), ("torchao", "torchao.quantization")
PEERS = (
    Peer("comfy_kitchen_w4a4", "comfy-kitchen convrot_w4a4", *_KITCHEN, swapper(peer_layers.kitchen)),
    Peer("comfy_kitchen_int8", "comfy-kitchen INT8 ConvRot", *_KITCHEN, swapper(peer_layers.kitchen_int8)),
    Peer("torchao_fp8", "torchao fp8 dynamic, per row", *_TORCHAO, peer_layers.torchao_fp8),
    Peer("torchao_fp8_tensor", "torchao fp8 dynamic, per tensor", *_TORCHAO, peer_layers.torchao_fp8_tensor),
    Peer("torchao_int8", "torchao int8 dynamic", *_TORCHAO, peer_layers.torchao_int8),
    Peer("bitsandbytes_nf4", "bitsandbytes NF4", "bitsandbytes", "bitsandbytes", swapper(peer_layers.bitsandbytes_nf4)),
)


@dataclass(frozen=True)
class Task:
    """What every peer is given: the inputs, BF16's output, and the sets of layers to try."""

    bench: Bench
    scale: Scale
    inputs: dict[str, Any]
    out: Tensor
    layer_sets: list[list[str]]


@dataclass
class Attempt:
    """A peer's layers in a model: in which ways its step runs, how far from BF16's; and why it does not in others."""

    side: Side
    layers: int
    l2: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def peers(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """A row each. The model of the one is gone before the next is built; ours stays."""
    torch._dynamo.reset()
    phase = Phases("peers")
    sides = flux_sides(bench, scale, phase, BF16, OURS)
    reference, ours = sides.pop(BF16), sides[OURS]
    task = Task(bench, scale, reference.inputs, reference.step(), layer_sets(reference.model))
    check_finite(BF16, task.out)
    del reference
    release()
    more = facts(bench, scale, fused=build.is_fused(ours.model), our_l2=relative_l2(ours.step(), task.out))
    fresh = False
    for peer in PEERS:
        if scale.peers and peer.name not in scale.peers:
            continue
        phase(peer.title)
        if not fresh:  # a peer's compiled blocks stand in the way of the next one's
            torch._dynamo.reset()
            ours.compile(bench.device)
            check_finite(OURS, ours.step(COMPILED))
        with peer_layers.own_settings():
            figure = _peer(task, peer, ours, more)
        fresh = "import" in figure.more.get("not_run", {})
        release()
        yield figure


def layer_sets(model: nn.Module) -> list[list[str]]:
    """What ours quantizes; and without the modulations, whose one row a few kernels cannot take."""
    decided = plan(model, "ours")
    return [list(decided), [name for name, scheme in decided.items() if scheme.activation_bits < 16]]


def _peer(task: Task, peer: Peer, ours: Side, more: dict[str, Any]) -> Figure:
    """Ours against the peer, both in the faster of the ways in which they run."""
    attempt = _attempt(task, peer)
    steps = {Contender(OURS, mode): ours.bind(mode) for mode in (EAGER, COMPILED)}
    steps |= {Contender(peer.name, mode): attempt.side.bind(mode) for mode in attempt.l2}
    tried = time_rounds(steps, task.bench.device, TRIAL)
    mine, theirs = (best(tried, [c for c in tried if c.side == side]) for side in (OURS, peer.name))
    chosen = {contender: steps[contender] for contender in (mine, theirs) if contender}
    spreads = time_rounds(chosen, task.bench.device, task.scale.rounds)
    more = more | {"peer_version": _version(peer.package), "layers": attempt.layers, "how": mine.how}
    if is_gpu(task.bench.device):
        more |= {"our_bytes": ours.held, "baseline_bytes": attempt.side.held}
    if attempt.errors:
        more["not_run"] = attempt.errors
    case, shape = f"peer_{peer.name}", shape_of(task.scale.side)
    if theirs is None:
        more["error"] = "; ".join(dict.fromkeys(attempt.errors.values()))
        figure = versus(case, shape, spreads[mine], spreads[mine], peer.title, more)
        return replace(figure, baseline=None)
    more |= {"baseline_how": theirs.how, "baseline_l2": attempt.l2[theirs.how]}
    return versus(case, shape, spreads[mine], spreads[theirs], peer.title, more)


def _attempt(task: Task, peer: Peer) -> Attempt:
    """With the set of layers with which most ways run; the larger set where they are even."""
    chosen: Attempt | None = None
    for names in task.layer_sets:
        attempt = _try(task, peer, names)
        if chosen is None or len(attempt.l2) > len(chosen.l2):
            chosen = attempt
        if not attempt.errors or "import" in attempt.errors:
            break
        release()
    assert chosen is not None, "there is a set of layers"
    return chosen


def _try(task: Task, peer: Peer, names: Sequence[str]) -> Attempt:
    attempt = Attempt(Side(peer.name, None, task.inputs), len(names))
    side, device, way = attempt.side, task.bench.device, "import"
    try:
        import_module(peer.module)
        way, before = "swap", allocated(device)
        side.model = make_flux(task.bench, task.scale)
        samples = samples_of(side.model, names)
        peer.swap(side.model, names)
        _gate_layers(peer, side.model, samples)
        del samples
        side.held = allocated(device) - before
        for way in (EAGER, COMPILED):
            _run(task, peer, attempt, way)
    except PEER_ERRORS as error:
        side.model = None
        attempt.errors[way] = first_line(error)
    return attempt


def samples_of(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """A copy of one layer of each shape."""
    by_shape = {linear_of(model, name).weight.shape: name for name in names}
    return {name: copy.deepcopy(linear_of(model, name)) for name in by_shape.values()}


def _gate_layers(peer: Peer, model: nn.Module, samples: dict[str, nn.Linear]) -> None:
    """A whole step hides what a layer gets wrong: the residual goes past it."""
    for name, linear in samples.items():
        source = Source(str(linear.weight.device))
        x = source.normal(GATE_ROWS, linear.in_features).to(linear.weight.dtype)
        gate_peer(f"{peer.title} at {name}", relative_l2(model.get_submodule(name)(x), linear(x)))


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """TimeoutError where the block takes longer: the compiler is Python, and waits for its workers in Python."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"{what} takes more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)  # should somebody take it for an error of their own
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run(task: Task, peer: Peer, attempt: Attempt, way: str) -> None:
    """The step this way once: it counts if it is finite."""
    label = f"{peer.title}, {way}"
    try:
        with within(PATIENCE, "compiling" if way == COMPILED else "the first step"):
            if way == COMPILED:
                attempt.side.compile(task.bench.device)
            theirs = attempt.side.step(way)
        check_finite(label, theirs)
        attempt.l2[way] = relative_l2(theirs, task.out)
    except PEER_ERRORS as problem:
        attempt.errors[way] = first_line(problem)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
