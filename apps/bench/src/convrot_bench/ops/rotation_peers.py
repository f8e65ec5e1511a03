"""Our rotation against other ways to rotate blocks of 256 columns: dense products and butterflies, ours and others'."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from convrot_bench.bench import PEER_ERRORS, Bench, GateError, first_line
from convrot_bench.ops.ceiling import Ceiling
from convrot_bench.ops.clock import Pair, time_pairs, timing_of
from convrot_bench.ops.gates import gate_codes
from convrot_bench.ops.problems import Source, count_sets, keeping, under
from convrot_bench.results import Figure
from convrot_kernels import hadamard, rotate, rotate_quantize, testing, transforms

GROUP = 256
FIRST = 512  # rows that are compared
ERROR = 1e-2  # of one or two roundings to bf16


@dataclass(frozen=True)
class Way:
    """A function of x (M, K) bf16, by which `matrix` (256, 256) is multiplied; `make` imports what it needs."""

    name: str
    title: str
    make: Callable[[str], Callable[[Tensor], Tensor]]
    matrix: Callable[[], Tensor]
    scaled: bool = True  # False: times any constant, which a kernel could fold into its scales


def _regular() -> Tensor:
    return hadamard(GROUP)


def _sylvester() -> Tensor:
    return transforms.sylvester(GROUP)


def _dense(device: str) -> Callable[[Tensor], Tensor]:
    matrix = hadamard(GROUP, torch.bfloat16, device)

    def run(x: Tensor) -> Tensor:
        return (x.view(-1, GROUP) @ matrix).view(x.shape)

    return run


def _butterfly(device: str) -> Callable[[Tensor], Tensor]:
    from convrot_bench.ops.fwht import fwht256

    return fwht256


def _fast_hadamard(device: str) -> Callable[[Tensor], Tensor]:
    transform = import_module("fast_hadamard_transform").hadamard_transform

    def run(x: Tensor) -> Tensor:
        out: Tensor = transform(x.view(-1, GROUP), scale=GROUP**-0.5)
        return out.view(x.shape)

    return run


def _hadacore(device: str) -> Callable[[Tensor], Tensor]:
    transform = import_module("faster_hadamard_transform").hadamard_transform

    def run(x: Tensor) -> Tensor:
        out: Tensor = transform(x.view(-1, GROUP), inplace=False)
        return out.view(x.shape)

    return run


WAYS = (
    Way("dense", "dense product, cuBLAS bf16", _dense, _regular),
    Way("butterfly", "block FWHT butterfly", _butterfly, _sylvester),
    Way("fast_hadamard_transform", "fast-hadamard-transform", _fast_hadamard, _sylvester),
    Way("hadacore", "HadaCore", _hadacore, _sylvester, scaled=False),
)


def compare(bench: Bench, m: int, k: int, *, ceiling: Ceiling) -> Iterator[Figure]:
    """A row a way; the rotation with the quantizer folded in stands beside ours, since that is what layers run."""
    source, moved, backend = Source(bench.device), 4 * m * k, bench.backends[0]
    sets = [(source.inputs(m, k),) for _ in range(count_sets(moved))]
    rotated = under("auto", bench.device, rotate)
    if not (
        bench.passes(gate, "rotate", rotated, sets[0][0], _regular(), True)
        and bench.passes(gate_codes, backend, rotate_quantize, sets[0], {}, True)
    ):
        return
    fused = under(backend, bench.device, rotate_quantize)
    contenders: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for way in WAYS:
        try:
            run = way.make(bench.device)
            gate(way.title, run, sets[0][0], way.matrix(), way.scaled)
            contenders[way.name] = (keeping(run, sets), sets)
        except PEER_ERRORS as error:
            errors[way.name] = first_line(error)
    beside = {"fused": (keeping(fused, sets), sets)}
    pairs, seconds = time_pairs(bench, (keeping(rotated, sets), sets), contenders, beside)
    more = bench.facts("auto", "rotate") | {"timing": timing_of(bench), "fused": seconds["fused"] * 1e6}
    more |= {"backend": more["auto"], "fused_bytes": testing.rotate_quantize_bytes(m, k)}
    for way in WAYS:
        pair = pairs.get(way.name, Pair(seconds[""], 0.0, timing_of(bench)))
        rate = moved / pair.ours
        fields = more | {"timing": pair.timing, "gb_s": rate / 1e9, "of_ceiling": ceiling.of_bytes(rate)}
        theirs = pair.theirs * 1e6 if way.name in pairs else None
        fields |= {"error": errors[way.name]} if theirs is None else {"baseline_gb_s": moved / pair.theirs / 1e9}
        yield Figure(f"rotations/{way.name}", {"M": m, "K": k}, pair.ours * 1e6, theirs, "us", way.title, fields)


def gate(name: str, run: Callable[[Tensor], Tensor], x: Tensor, matrix: Tensor, scaled: bool) -> None:
    """run(x) against x times the matrix, block by block, in fp64."""
    out = run(x)[-FIRST:].double()
    exact = transforms.apply_blockwise(x[-FIRST:].double(), matrix.to(x.device, torch.float64))
    factor = 1.0 if scaled else float((out * exact).sum() / exact.square().sum()) or 1.0
    error = float((out / factor - exact).norm() / exact.norm())
    if not error <= ERROR:
        raise GateError(f"{name} at {tuple(x.shape)} disagrees: relative error {error:.1e} of the rotation")
