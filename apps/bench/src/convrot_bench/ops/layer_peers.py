"""Products and whole linears of others at FLUX.1-dev's shapes: int8 and fp8 of PyTorch, and layers of other projects.

What is not installed or does not run has a row too: without a figure, with its error.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from convrot_bench.bench import PEER_ERRORS, Bench, first_line
from convrot_bench.ops.ceiling import INT_MM, Ceiling
from convrot_bench.ops.clock import Contender, Pair, time_pairs, timing_of
from convrot_bench.ops.gates import gate_integers, gate_peer, relative_l2
from convrot_bench.ops.linears import Linear, agrees, coded, draw_sets, multiply, whole_op
from convrot_bench.ops.problems import keeping, prepared, under
from convrot_bench.results import Figure
from convrot_kernels import rotate_quantize, testing, unpack_int4

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of FP8
SETS = 3  # of tensors: a layer of each is compiled
COMPILED = "torchao"  # whose layers are written to be compiled


@dataclass(frozen=True)
class Product:
    """A product of PyTorch: what its operands are made of, and the call."""

    name: str
    title: str
    operands: Callable[[Linear], tuple[Any, ...]]
    call: Callable[..., Tensor]
    exact: bool = False  # int32 sums of our codes


def _int_operands(one: Linear) -> tuple[Any, ...]:
    return rotate_quantize(one.x)[0], unpack_int4(one.packed).t()


def _fp8(x: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """-> e4m3 values and the fp32 scale of the tensor, or of each row."""
    most = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = most.float() / LARGEST
    return (x.float() / scale).to(FP8), scale


def _fp8_operands(dim: int | None) -> Callable[[Linear], tuple[Any, ...]]:
    def operands(one: Linear) -> tuple[Any, ...]:
        (a, a_scale), (b, b_scale) = _fp8(one.x, dim), _fp8(one.weight, dim)
        return a, b.t(), a_scale, b_scale.t() if dim is not None else b_scale, one.bias

    return operands


def _scaled(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
    return torch._scaled_mm(a, b, a_scale, b_scale, bias, out_dtype=torch.bfloat16, use_fast_accum=True)


PRODUCTS = (
    Product("int_mm", f"{INT_MM}, int32 sums alone", _int_operands, torch._int_mm, exact=True),
    Product("fp8_tensor", "torch._scaled_mm fp8, a scale a tensor", _fp8_operands(None), _scaled),
    Product("fp8_row", "torch._scaled_mm fp8, a scale a row", _fp8_operands(1), _scaled),
)


@dataclass
class Entered:
    """Who can be timed, how far each is from the 16-bit product, and why others cannot."""

    contenders: dict[str, Contender]
    l2: dict[str, float]
    errors: dict[str, str]

    def enter(self, name: str, make: Callable[[], tuple[Contender, float | None]]) -> None:
        """What `make` raises is the row's error."""
        try:
            self.contenders[name], error = make()
            if error is not None:
                self.l2[name] = error
        except PEER_ERRORS as problem:
            self.errors[name] = first_line(problem)


def compare(bench: Bench, m: int, n: int, k: int, *, ceiling: Ceiling) -> Iterator[Figure]:
    """Our product against theirs, then our whole linear against their layers."""
    from convrot_bench.model.peer_layers import own_settings
    from convrot_bench.model.peers import PEERS  # which imports ops

    sets, backend = draw_sets(bench, m, n, k)[:SETS], bench.backends[0]
    if not agrees(bench, backend, sets[0]):
        return
    exact = sets[0].x.float() @ sets[0].weight.float().t() + sets[0].bias.float()
    arguments = [(*coded(s.x, backend), prepared(s.packed, s.scale, backend), s.bias) for s in sets]
    product = keeping(under(backend, bench.device, multiply), sets), arguments
    whole, whole_arguments = whole_op(bench, backend, sets)
    ours = relative_l2(whole(*whole_arguments[0]), exact)
    entered = Entered({}, {}, {})
    for one in PRODUCTS:
        entered.enter(one.name, partial(_product, one, sets, exact))
    titles = {one.name: (one.title, "torch") for one in PRODUCTS}
    yield from _figures(bench, ceiling, (m, n, k), product, entered, titles, ours)
    entered = Entered({}, {}, {})
    titles = {peer.name: (peer.title, peer.package) for peer in PEERS}
    linear = keeping(whole, sets), whole_arguments
    with own_settings():
        for peer in PEERS:
            entered.enter(peer.name, partial(_layer, peer, sets, exact))
        yield from _figures(bench, ceiling, (m, n, k), linear, entered, titles, ours)


def _product(one: Product, sets: list[Linear], exact: Tensor) -> tuple[Contender, float | None]:
    arguments = [one.operands(s) for s in sets]
    out = one.call(*arguments[0])
    if one.exact:
        gate_integers(one.title, out, arguments[0][0], arguments[0][1].t())
        return (keeping(one.call, sets), arguments), None
    error = relative_l2(out, exact)
    gate_peer(one.title, error)
    return (keeping(one.call, sets), arguments), error


def _layer(peer: Any, sets: list[Linear], exact: Tensor) -> tuple[Contender, float | None]:
    """A peer's layer a set of tensors; torchao's compiled, the others' as they are."""
    import_module(peer.module)
    layers = [nn.Sequential(_linear(s)) for s in sets]
    for layer in layers:
        peer.swap(layer, ["0"])

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = layer(x)
        return out

    run = call
    if peer.package == COMPILED:
        torch._dynamo.reset()  # it compiles a function for so many layers, and then gives up without a word
        run = torch.compile(call, dynamic=False)
    error = relative_l2(run(layers[0], sets[0].x), exact)
    gate_peer(peer.title, error)
    return (keeping(run, sets), [(layer, s.x) for layer, s in zip(layers, sets, strict=True)]), error


def _linear(one: Linear) -> nn.Linear:
    n, k = one.weight.shape
    linear = nn.Linear(k, n, device="meta")
    linear.weight = nn.Parameter(one.weight.clone(), requires_grad=False)
    linear.bias = nn.Parameter(one.bias, requires_grad=False)
    return linear


def _figures(
    bench: Bench, ceiling: Ceiling, mnk: tuple[int, int, int], ours: Contender, entered: Entered,
    titles: dict[str, tuple[str, str]], our_l2: float,
) -> Iterator[Figure]:  # fmt: skip
    pairs, seconds = time_pairs(bench, ours, entered.contenders)
    facts = bench.facts(bench.backends[0]) | {"our_l2": our_l2}
    for name, (title, package) in titles.items():
        pair = pairs.get(name, Pair(seconds[""], 0.0, timing_of(bench)))
        rate = testing.gemm_operations(*mnk) / pair.ours
        more = facts | {"timing": pair.timing, "tops": rate / 1e12, "of_ceiling": ceiling.of_operations(rate)}
        more["peer_version"] = _version(package)
        theirs = pair.theirs * 1e6 if name in pairs else None
        if theirs is None:
            more["error"] = entered.errors[name]
        if name in entered.l2:
            more["baseline_l2"] = entered.l2[name]
        shape = dict(zip("MNK", mnk, strict=True))
        yield Figure(f"peers/{name}", shape, pair.ours * 1e6, theirs, "us", title, more)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
