"""What an op costs beside the GPU's time: the host's, and the memory of a weight."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from convrot_bench.bench import Bench, GateError
from convrot_bench.ops.linears import Linear, agrees, multiply
from convrot_bench.ops.problems import Source, packs_codes, prepared, route
from convrot_bench.results import Figure
from convrot_kernels import restore_weight, rotate_quantize, testing, use_backend

HOST_TIMING = "host, mean of 1000 calls without waiting; baseline before and after"


def host_cost(bench: Bench, m: int, n: int, k: int) -> Iterator[Figure]:
    """Microseconds that the host needs to enqueue the public ops, against F.linear in the same run."""
    fastest = bench.backends[0]
    chosen = route(fastest, bench.device)
    one = Linear.draw(Source(bench.device), m, n, k, fastest)
    if not agrees(bench, chosen, one):
        return
    packed = packs_codes(bench.device, chosen)

    def quantize(x: torch.Tensor) -> Any:
        return rotate_quantize(x, packed=packed)

    with use_backend(chosen):
        calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
            "rotate_quantize": (quantize, (one.x,)),
            "scaled_mm": (multiply, (*quantize(one.x), prepared(one.packed, one.scale, chosen), one.bias)),
        }
        before = testing.time_host(F.linear, (one.x, one.weight, one.bias))
        ours = {op: testing.time_host(*call) for op, call in calls.items()}
        after = testing.time_host(F.linear, (one.x, one.weight, one.bias))
    baseline = (before + after) / 2
    for op, seconds in ours.items():
        more = bench.facts(fastest, op) | {"timing": HOST_TIMING, "baselines": [before * 1e6, after * 1e6]}
        shape = {"M": m, "N": n, "K": k, "op": op}
        yield Figure("host_cost", shape, seconds * 1e6, baseline * 1e6, "us", "F.linear bf16", more)


def weight_bits(bench: Bench, n: int, k: int) -> Iterator[Figure]:
    """Bytes of a weight as it lies in memory, scales included, against bf16; codes must come back bit for bit."""
    backend = bench.backends[0]
    one = Linear.draw(Source(bench.device), 1, n, k, backend)
    weight = prepared(one.packed, one.scale, backend)
    if not torch.equal(restore_weight(weight.codes, weight.layout), one.packed):
        raise GateError(f"prepare_weight to {weight.layout} on {bench.device} loses codes")
    held, scales, wide = (t.untyped_storage().nbytes() for t in (weight.codes, weight.scale, one.weight))
    more = bench.facts(backend) | {"bits_per_weight": 8 * held / (n * k), "scale_bytes": scales}
    yield Figure("weight_bits", {"N": n, "K": k}, held + scales, wide, "bytes", "bf16 weight", more)
