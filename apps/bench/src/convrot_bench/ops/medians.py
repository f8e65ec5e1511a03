"""The cases that a CPU measures: medians of single calls, each against its 16-bit counterpart."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.nn import functional as F

from convrot_bench.bench import Bench
from convrot_bench.ops.linears import Linear, agrees, coded, multiply, whole_op
from convrot_bench.ops.problems import Source, prepared, under
from convrot_bench.ops.rotations import torch_copy
from convrot_bench.results import Figure
from convrot_kernels import rotate_quantize, testing

SETS = 4  # that the calls go round, so that none finds its own data in the cache
TIMING = "median of single calls"


def measure(bench: Bench, m: int, n: int, k: int, cases: Sequence[str], repeats: int) -> Iterator[Figure]:
    """One linear on every backend."""
    source = Source(bench.device)
    sets = [Linear.draw(source, m, n, k, bench.backends[0]) for _ in range(SETS)]

    def time_of(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> float:
        return testing.time_median(function, arguments, repeats=repeats)

    linear = time_of(F.linear, [(s.x, s.weight, s.bias) for s in sets])
    moved = testing.rotate_quantize_bytes(m, k)
    # a copy of x moves 4 M K bytes; scaled to the bytes that rotate_quantize moves
    copy = time_of(torch_copy, [(s.x.clone(), s.x) for s in sets]) * moved / (4 * m * k)
    for backend in bench.backends:
        if not agrees(bench, backend, sets[0]):
            continue
        more = bench.facts(backend) | {"timing": TIMING}
        shape = {"M": m, "N": n, "K": k}
        if "gemm_w4a4" in cases:
            arguments = [(*coded(s.x, backend), prepared(s.packed, s.scale, backend), s.bias) for s in sets]
            ours = time_of(under(backend, bench.device, multiply), arguments)
            speed = {"tops": testing.gemm_operations(m, n, k) / ours / 1e12}
            yield Figure("gemm_w4a4", shape, ours * 1e6, linear * 1e6, "us", "F.linear bf16", more | speed)
        if "linear_w4a4" in cases:
            ours = time_of(*whole_op(bench, backend, sets))
            yield Figure("linear_w4a4", shape, ours * 1e6, linear * 1e6, "us", "F.linear bf16", more)
        if "rotate_quantize" in cases:
            ours = time_of(under(backend, bench.device, rotate_quantize), [(s.x,) for s in sets])
            plain = {"M": m, "K": k, "prologue": "none"}
            speed = {"gb_s": moved / ours / 1e9, "bits": 4}
            yield Figure("rotate_quantize", plain, ours * 1e6, copy * 1e6, "us", "copy of the same bytes", more | speed)
