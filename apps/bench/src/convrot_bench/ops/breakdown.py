"""Where the time of one W4A4 linear goes: its steps as kernels of their own, against the fused kernels.

Rotate, scale, quantize, pack, product, epilogue; every step on the results of the one before it, each checked against
the plain formula on the same input. Between steps values are bf16 and sums int32, as unfused code has them in memory.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convrot_bench.bench import Bench
from convrot_bench.ops.ceiling import Ceiling
from convrot_bench.ops.clock import time_all, timing_of
from convrot_bench.ops.gates import gate_close, gate_integers, gate_same
from convrot_bench.ops.linears import BASELINE, Linear, agrees, coded, draw_sets, matmul, multiply, whole_op
from convrot_bench.ops.problems import keeping, packs_codes, prepared, under
from convrot_bench.results import Figure
from convrot_kernels import pack_int4, rotate, rotate_quantize, scaled_mm, testing, unpack_int4, use_backend

STEPS = ("rotate", "scale", "quantize", "pack", "gemm", "epilogue")  # fields of a row, in microseconds
FUSED = ("rotate_quantize", "scaled_mm")  # and what of ours does them
UNFUSED = (
    "rotate",
    "scale",
    "quantize",
    "gemm",
    "epilogue",
)  # what computes the same; int8 products read no packed codes
ROUNDED = 5e-3


class Stages(NamedTuple):
    """What every step of one linear reads: see stages.py for shapes."""

    x: Tensor
    rotated: Tensor
    scale: Tensor
    codes: Tensor
    weight: Tensor  # int8 (N, K)
    weight_scale: Tensor
    acc: Tensor
    bias: Tensor


def _kernels() -> Any:
    from convrot_bench.ops import stages  # needs Triton

    return stages


def steps() -> dict[str, Callable[[Stages], Any]]:
    """Each step on its own input."""
    kernels = _kernels()
    return {
        "rotate": lambda s: rotate(s.x),
        "scale": lambda s: kernels.scale(s.rotated),
        "quantize": lambda s: kernels.quantize(s.rotated, s.scale),
        "pack": lambda s: kernels.pack(s.codes),
        "gemm": lambda s: torch._int_mm(s.codes, s.weight.t()),
        "epilogue": lambda s: kernels.epilogue(s.acc, s.scale, s.weight_scale, s.bias),
    }


def staged(one: Linear) -> Stages:
    """The results of every step."""
    kernels = _kernels()
    rotated, weight = rotate(one.x), unpack_int4(one.packed)
    scale = kernels.scale(rotated)
    codes = kernels.quantize(rotated, scale)
    return Stages(one.x, rotated, scale, codes, weight, one.scale, torch._int_mm(codes, weight.t()), one.bias)


def gate(s: Stages) -> None:
    """Every step against the plain formula on the same input."""
    run = {name: step(s) for name, step in steps().items()}
    with use_backend("reference"):
        gate_close("the step rotate", s.rotated, rotate(s.x), ROUNDED)
        wanted = (s.rotated.float().abs().amax(1) / torch.full((), 7.0, device=s.x.device)).clamp_min(1e-10)
        codes = (s.rotated.float() / s.scale[:, None]).round().clamp(-7, 7).to(torch.int8)
        out = scaled_mm(s.codes[-64:], s.weight, s.scale[-64:], s.weight_scale, s.bias, torch.bfloat16)
    gate_same("the step scale", run["scale"], wanted)
    gate_same("the step quantize", run["quantize"], codes)
    gate_same("the step pack", run["pack"], pack_int4(s.codes))
    gate_integers("the step gemm", run["gemm"], s.codes, s.weight)
    gate_same("the step epilogue", run["epilogue"][-64:], out)


def measure(bench: Bench, m: int, n: int, k: int, *, ceiling: Ceiling) -> Iterator[Figure]:
    """Ours fused against the sum of the steps; every part of both in the row."""
    sets, backend = draw_sets(bench, m, n, k), bench.backends[0]
    some = [staged(s) for s in sets]
    if not (agrees(bench, backend, sets[0]) and bench.passes(gate, some[0])):
        return
    packed = packs_codes(bench.device, backend)
    whole, arguments = whole_op(bench, backend, sets)
    products = [(*coded(s.x, backend), prepared(s.packed, s.scale, backend), s.bias) for s in sets]
    quantize = under(backend, bench.device, lambda x: rotate_quantize(x, packed=packed))
    contenders: dict[str, Any] = {name: (keeping(step, sets), [(s,) for s in some]) for name, step in steps().items()}
    contenders |= {
        "linear": (keeping(whole, sets), arguments),
        "fused_rotate_quantize": (keeping(quantize, sets), [(s.x,) for s in sets]),
        "fused_scaled_mm": (keeping(under(backend, bench.device, multiply), sets), products),
        BASELINE: (keeping(matmul, sets), [(s.x, s.weight) for s in sets]),
    }
    seconds = time_all(bench, contenders)
    ours, unfused = seconds.pop("linear"), sum(seconds[name] for name in UNFUSED)
    rate = testing.gemm_operations(m, n, k) / ours
    more = bench.facts(backend) | {"timing": timing_of(bench), "tops": rate / 1e12}
    more |= {"of_ceiling": ceiling.of_operations(rate), "packed": packed}
    more |= {name: value * 1e6 for name, value in seconds.items()}
    yield Figure("breakdown", {"M": m, "N": n, "K": k}, ours * 1e6, unfused * 1e6, "us", "unfused steps", more)
