"""Ops against their 16-bit counterparts: compared with the reference first; only what agrees is timed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from convrot_bench import shapes
from convrot_bench.bench import Bench, Job
from convrot_bench.ops import attention, breakdown, layer_peers, medians, peers, rotation_peers, survey
from convrot_bench.ops.ceiling import Ceiling
from convrot_bench.ops.clock import is_gpu
from convrot_bench.ops.costs import host_cost, weight_bits
from convrot_bench.ops.linears import gemm_w4a4, gemv_w4a16, linear_w4a4
from convrot_bench.ops.peers import linear_w4a4_vs_comfy_kitchen
from convrot_bench.ops.problems import backends_of
from convrot_bench.ops.rotations import Variant, case_of, rotate_quantize_all
from convrot_bench.ops.step import gemm_step, gemv_step
from convrot_bench.results import Figure
from convrot_kernels import available_backends

CASES = (
    "gemm_w4a4", "linear_w4a4", "linear_w4a4_vs_comfy_kitchen", "gemm_step", "gemv_w4a16", "gemv_step",
    "rotate_quantize", "rotate_quantize_triton", "host_cost", "weight_bits",
)  # fmt: skip
CPU_CASES = ("gemm_w4a4", "linear_w4a4", "rotate_quantize")
# asked for by name: much more than the bars, each in a minute or two
SHARES = ("survey", "breakdown", "rotations", "peers")  # of the ceiling of their run
EXTRA_CASES = (*SHARES, "attention")
EXTRA_CPU_CASES = ("survey", "attention")

Sizes = tuple[Sequence[tuple[int, int]], Sequence[int]]


def select(cases: Sequence[str], device: str) -> tuple[str, ...]:
    """The named cases, or those of the bars that the device has."""
    gpu = torch.device(device).type == "cuda"
    default, extra = (CASES, EXTRA_CASES) if gpu else (CPU_CASES, EXTRA_CPU_CASES)
    for case in cases:
        if case not in CASES + EXTRA_CASES:
            raise ValueError(f"ops: unknown case {case!r}; use one of {', '.join(CASES + EXTRA_CASES)}")
        if case not in default + extra:
            known = ", ".join(default + extra)
            raise ValueError(f"ops: case {case!r} needs a GPU, got device {device}; here use {known}")
    return tuple(cases) or default


def prepare(device: str, say: Callable[[str], None]) -> Bench:
    """The backends to measure on the device; ValueError with their reasons where there is none."""
    backends = backends_of(device)
    if not backends:
        reasons = "; ".join(f"{name}: {why}" for name, why in available_backends(device).items() if why)
        raise ValueError(f"ops: no compiled backend runs on {device}: {reasons}")
    return Bench(device, backends, say)


def plan(
    bench: Bench, cases: Sequence[str], sizes: Sizes, repeats: int, families: Sequence[shapes.Family] = ()
) -> list[Job]:
    """The jobs of the cases on the bench's device, in order; `families` are what the survey takes."""
    extra = _extra(bench, cases, families)
    if not set(cases) - set(EXTRA_CASES):
        return extra
    return _bars(bench, cases, sizes, repeats) + extra


def _extra(bench: Bench, cases: Sequence[str], families: Sequence[shapes.Family]) -> list[Job]:
    """The ceiling of this run first: it is what most of the rest is a share of."""
    ceiling = Ceiling()
    jobs = [Job("ceiling", ceiling.measure)] if set(cases) & set(SHARES) else []
    if "survey" in cases:
        jobs += survey.jobs(ceiling, families)
    if "breakdown" in cases:
        products = [(shapes.FLUX_TOKENS[0], *linear) for linear in shapes.FLUX_LINEARS]
        jobs += [_job("breakdown", breakdown.measure, *mnk, ceiling=ceiling) for mnk in products]
    if "rotations" in cases:
        jobs += [_job("rotations", rotation_peers.compare, *mk, ceiling=ceiling) for mk in shapes.ROTATED]
    if "peers" in cases:
        jobs += [_job("peers", layer_peers.compare, *mnk, ceiling=ceiling) for mnk in shapes.PEER_PRODUCTS]
    if "attention" in cases:
        sizes = shapes.ATTENTION if is_gpu(bench.device) else shapes.MINI_FLUX_ATTENTION
        jobs += [_job("attention", attention.measure, *one) for one in sizes]
    return jobs


def _bars(bench: Bench, cases: Sequence[str], sizes: Sizes, repeats: int) -> list[Job]:
    linears, tokens = sizes
    products = [(m, n, k) for m in tokens for n, k in linears]
    if torch.device(bench.device).type != "cuda":
        return [_job("linear", medians.measure, *mnk, cases, repeats) for mnk in products]
    jobs = []
    for case, function in (("gemm_w4a4", gemm_w4a4), ("linear_w4a4", linear_w4a4)):
        jobs += [_job(case, function, *mnk) for mnk in products if case in cases]
    if (case := "linear_w4a4_vs_comfy_kitchen") in cases:
        if reason := peers.why_not():
            bench.say(f"{case} skipped: {reason}")
        else:
            jobs += [_job(case, linear_w4a4_vs_comfy_kitchen, *mnk) for mnk in products]
    if "gemm_step" in cases:
        jobs.append(_job("gemm_step", gemm_step))
    if "gemv_w4a16" in cases:
        jobs += [_job("gemv_w4a16", gemv_w4a16, *mnk) for mnk in shapes.GEMV_PRODUCTS]
    if "gemv_step" in cases:
        jobs.append(_job("gemv_step", gemv_step))
    jobs += _rotations(bench, cases)
    if "host_cost" in cases:
        jobs.append(_job("host_cost", host_cost, *shapes.HOST_PRODUCT))
    if "weight_bits" in cases:
        jobs.append(_job("weight_bits", weight_bits, *shapes.WEIGHT))
    return jobs


def _job(label: str, function: Callable[..., Iterator[Figure]], *arguments: Any, **options: Any) -> Job:
    numbers = " x ".join(str(a) for a in arguments if isinstance(a, int))
    return Job(f"{label} {numbers}".strip(), lambda bench: function(bench, *arguments, **options))


def _rotations(bench: Bench, cases: Sequence[str]) -> list[Job]:
    """A job an (M, K); the forms of codes that are not the default once, at the largest M."""
    backends = tuple(name for name in bench.backends if case_of(name) in cases)
    for case in ("rotate_quantize", "rotate_quantize_triton"):
        if case in cases and case not in map(case_of, backends):
            bench.say(f"{case} skipped: its backend does not run on {bench.device}")
    if not backends:
        return []

    def measure(bench: Bench, m: int, k: int, variants: Sequence[Variant]) -> Iterator[Figure]:
        return rotate_quantize_all(replace(bench, backends=backends), m, k, variants)

    jobs = []
    for m in shapes.ROTATE_TOKENS:
        for k, prologues in shapes.ROTATE_PROLOGUES.items():
            variants = [Variant(prologue) for prologue in prologues]
            if m == max(shapes.ROTATE_TOKENS):
                variants += [Variant(bits=8), Variant(packed=True)]
            jobs.append(_job("rotate_quantize", measure, m, k, variants))
    return jobs
