"""The clock of cases that measure much: shorter than the clock of the bars, the same for all contenders of a row."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from convrot_bench.bench import Bench
from convrot_kernels import testing

SECONDS = 0.05  # untimed, then timed, in each of two rounds: hundreds of contenders take minutes
GRAPHED = f"cuda graph, two rounds of {SECONDS} s after {SECONDS} s untimed"
SINGLE = "median of single calls"
EVENTS = "cuda events, one call at a time, on both sides: no CUDA graph takes theirs"
REPEATS, FEW, MANY = 7, 3, 60  # single calls: of a CPU, of what takes long, of what no graph takes

Contender = tuple[Callable[..., Any], Sequence[tuple[Any, ...]]]
Contenders = Mapping[str, Contender]


def is_gpu(device: str) -> bool:
    """Whether the clock is the GPU's."""
    return torch.device(device).type == "cuda"


def time_all(bench: Bench, contenders: Contenders) -> dict[str, float]:
    """{name: (function, argument sets)} -> {name: seconds a call}, all in one run."""
    if is_gpu(bench.device):
        return testing.time_graphs(contenders, seconds=SECONDS)
    return time_singly(contenders, REPEATS)


def time_singly(contenders: Contenders, repeats: int) -> dict[str, float]:
    """Seconds of single calls: on a CPU, and for what no CUDA graph takes."""
    return {n: testing.time_median(f, a, repeats=repeats, warmup=1) for n, (f, a) in contenders.items()}


class Pair(NamedTuple):
    """Seconds of both sides on equal terms, and on which."""

    ours: float
    theirs: float
    timing: str


def time_pairs(
    bench: Bench, ours: Contender, peers: Contenders, beside: Contenders | None = None
) -> tuple[dict[str, Pair], dict[str, float]]:
    """Ours against each peer, and the seconds of what stands beside; a peer that no CUDA graph takes meets ours so."""
    graphed = {name: peer for name, peer in peers.items() if not is_gpu(bench.device) or capturable(*peer)}
    seconds = time_all(bench, {"": ours, **graphed, **(beside or {})})
    pairs = {name: Pair(seconds[""], seconds[name], timing_of(bench)) for name in graphed}
    if singly := {name: peer for name, peer in peers.items() if name not in graphed}:
        alone = time_singly({"": ours, **singly}, MANY)
        pairs |= {name: Pair(alone[""], alone[name], EVENTS) for name in singly}
    return pairs, {"": seconds[""]} | {name: seconds[name] for name in beside or {}}


def timing_of(bench: Bench) -> str:
    """How time_all takes the time."""
    return GRAPHED if is_gpu(bench.device) else SINGLE


def capturable(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> bool:
    """Whether a CUDA graph takes the call, once it has run."""
    function(*arguments[0])
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            function(*arguments[0])
    except RuntimeError:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
        torch.cuda.synchronize()
        return False
    return True
