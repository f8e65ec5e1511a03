"""Cases of one linear: the product alone, the whole op, weight-only products. Sustained, as CUDA graphs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from convrot_bench.bench import Bench
from convrot_bench.ops.gates import gate_codes, gate_product, gate_values
from convrot_bench.ops.problems import Source, Weight, count_sets, keeping, packs_codes, prepared, under
from convrot_bench.results import Figure
from convrot_kernels import rotate_quantize, scaled_mm, testing, use_backend

TIMING = "cuda graph, sustained"
BASELINE = "bf16"  # its name among the contenders


@dataclass(frozen=True)
class Linear:
    """x (M, K) bf16, weight (N, K) bf16, bias (N,) bf16, and the row-major packed codes (N, K/2) of the weight."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    packed: Tensor
    scale: Tensor

    @staticmethod
    def draw(source: Source, m: int, n: int, k: int, backend: str, group_size: int = 256) -> "Linear":
        weight = source.weight(n, k)
        with use_backend(backend):
            packed, scale = rotate_quantize(weight, group_size, packed=True)
        return Linear(source.inputs(m, k), weight, source.vector(n), packed, scale)


def draw_sets(bench: Bench, m: int, n: int, k: int) -> list[Linear]:
    """As many as fill the caches several times over with what the 4-bit side touches."""
    source, touched = Source(bench.device), testing.gemm_bytes(m, n, k, a_bits=8)
    return [Linear.draw(source, m, n, k, bench.backends[0]) for _ in range(count_sets(touched))]


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def multiply(codes: Tensor, a_scale: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    return scaled_mm(codes, weight.codes, a_scale, weight.scale, bias, torch.bfloat16, b_layout=weight.layout)


def multiply_values(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    return scaled_mm(x, weight.codes, None, weight.scale, bias, b_layout=weight.layout)


def whole(packed: bool) -> Callable[[Tensor, Weight, Tensor], Tensor]:
    """-> the op that a quantized layer runs: rotate, quantize, multiply, dequantize, bias."""

    def linear(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
        codes, a_scale = rotate_quantize(x, packed=packed)
        return multiply(codes, a_scale, weight, bias)

    return linear


def coded(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The backend's codes in the form it prefers, and their scale."""
    with use_backend(backend):
        return rotate_quantize(x, packed=packs_codes(str(x.device), backend))


def agrees(bench: Bench, backend: str, one: Linear) -> bool:
    """Codes, then the product of those codes, at the exact shape."""
    options = {"packed": packs_codes(bench.device, backend)}
    return bench.passes(gate_codes, backend, rotate_quantize, (one.x,), options, True) and bench.passes(
        gate_product, backend, *coded(one.x, backend), prepared(one.packed, one.scale, backend), one.bias
    )


def gemm_w4a4(bench: Bench, m: int, n: int, k: int) -> Iterator[Figure]:
    """scaled_mm with scales and bias against torch.matmul without."""
    sets = draw_sets(bench, m, n, k)
    contenders: dict[str, Any] = {BASELINE: (keeping(matmul, sets), [(s.x, s.weight) for s in sets])}
    for backend in bench.backends:
        if agrees(bench, backend, sets[0]):
            arguments = [(*coded(s.x, backend), prepared(s.packed, s.scale, backend), s.bias) for s in sets]
            contenders[backend] = (keeping(under(backend, bench.device, multiply), sets), arguments)
    yield from _figures(bench, "gemm_w4a4", (m, n, k), contenders, "torch.matmul bf16")


def linear_w4a4(bench: Bench, m: int, n: int, k: int) -> Iterator[Figure]:
    """The whole op against F.linear, both with bias."""
    sets = draw_sets(bench, m, n, k)
    contenders: dict[str, Any] = {BASELINE: (keeping(F.linear, sets), [(s.x, s.weight, s.bias) for s in sets])}
    for backend in bench.backends:
        if agrees(bench, backend, sets[0]):
            function, arguments = whole_op(bench, backend, sets)
            contenders[backend] = (keeping(function, sets), arguments)
    yield from _figures(bench, "linear_w4a4", (m, n, k), contenders, "F.linear bf16")


def whole_op(bench: Bench, backend: str, sets: list[Linear]) -> tuple[Callable[..., Tensor], list[tuple[Any, ...]]]:
    """The whole op on the backend, and its arguments for each set."""
    function = under(backend, bench.device, whole(packs_codes(bench.device, backend)))
    return function, [(s.x, prepared(s.packed, s.scale, backend), s.bias) for s in sets]


def gemv_w4a16(bench: Bench, m: int, n: int, k: int) -> Iterator[Figure]:
    """16-bit values times 4-bit codes, as the modulation layers run, against torch.matmul."""
    backend, source = bench.backends[0], Source(bench.device)
    count = count_sets(testing.gemm_bytes(m, n, k, a_bits=16))
    sets = [Linear.draw(source, m, n, k, backend) for _ in range(count)]
    arguments = [(s.x, prepared(s.packed, s.scale, backend), s.bias) for s in sets]
    contenders: dict[str, Any] = {BASELINE: (keeping(matmul, sets), [(s.x, s.weight) for s in sets])}
    if bench.passes(gate_values, backend, *arguments[0]):
        contenders[backend] = (keeping(under(backend, bench.device, multiply_values), sets), arguments)
    moved = testing.gemm_bytes(m, n, k, a_bits=16)
    yield from _figures(bench, "gemv_w4a16", (m, n, k), contenders, "torch.matmul bf16", moved)


def _figures(
    bench: Bench, case: str, mnk: tuple[int, int, int], contenders: dict[str, Any], name: str, moved: int | None = None
) -> Iterator[Figure]:
    """Time the contenders together; one row for each but the baseline."""
    if len(contenders) < 2:
        return
    seconds = testing.time_graphs(contenders)
    baseline = seconds.pop(BASELINE)
    for backend, ours in seconds.items():
        speed = {"tops": testing.gemm_operations(*mnk) / ours / 1e12} if moved is None else {"gb_s": moved / ours / 1e9}
        more = bench.facts(backend) | speed | {"timing": TIMING}
        yield Figure(case, dict(zip("MNK", mnk, strict=True)), ours * 1e6, baseline * 1e6, "us", name, more)
