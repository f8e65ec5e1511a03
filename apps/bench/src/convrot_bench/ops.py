"""Ops against their 16-bit counterparts: compared with the reference first; only what agrees is timed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convrot_bench.results import Writer
from convrot_kernels import available_backends, preferred_codes, rotate_quantize, scaled_mm, use_backend
from convrot_kernels.testing import (
    assert_codes_close,
    assert_equal,
    gemm_operations,
    make_inputs,
    rotate_quantize_bytes,
    time_median,
)

BUFFERS = 4  # sets of tensors that the calls go round, so that none finds its own data in the cache


class GateError(RuntimeError):
    """An op did not agree with the reference: it is not timed."""


@dataclass(frozen=True)
class Problem:
    """One linear: M tokens, N outputs, K inputs, with its tensors made on the device."""

    m: int
    n: int
    k: int
    device: str

    def tensors(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (M, K) bf16, weight (N, K) bf16, bias (N,), packed codes (N, K/2), their scale (N,)."""
        x = make_inputs(self.m, self.k, device=self.device, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        weight = (torch.randn(self.n, self.k, generator=generator) * self.k**-0.5).bfloat16().to(self.device)
        bias = torch.randn(self.n, generator=generator).bfloat16().to(self.device)
        return x, weight, bias, *rotate_quantize(weight, packed=True)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return rotate_quantize(x, packed=preferred_codes(x.device) == "packed")


def linear_w4a4(x: Tensor, weight: Tensor, bias: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """The whole op: rotate, quantize, multiply, dequantize, bias."""
    codes, a_scale = quantize(x)
    return scaled_mm(codes, packed, a_scale, scale, bias, x.dtype)


def gate(problem: Problem, backend: str) -> None:
    """The backend's codes and product against the reference's on the same inputs; GateError says what differs."""
    x, _, bias, packed, scale = problem.tensors(seed=1000)
    with use_backend("reference"):
        codes, a_scale = quantize(x)
        product = scaled_mm(codes, packed, a_scale, scale, bias, torch.bfloat16)
    try:
        with use_backend(backend):
            assert_codes_close(rotate_quantize(x, packed=codes.dtype == torch.uint8), (codes, a_scale))
            assert_equal(scaled_mm(codes, packed, a_scale, scale, bias, torch.bfloat16), product)
    except AssertionError as error:
        raise GateError(f"{backend} at M={problem.m}, N={problem.n}, K={problem.k} disagrees: {error}") from None


def measure(problem: Problem, backend: str, repeats: int) -> Iterator[tuple[str, float, float, str, dict[str, Any]]]:
    """(case, our seconds, baseline seconds, baseline's name, more) for each case of a problem."""
    gate(problem, backend)
    sets = [problem.tensors(seed) for seed in range(BUFFERS)]

    def time_of(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> float:
        return time_median(function, arguments, repeats=repeats)

    bf16 = time_of(F.linear, [s[:3] for s in sets])
    copies = [(s[0].clone(), s[0]) for s in sets]
    copy = time_of(lambda target, source: target.copy_(source), copies)
    with use_backend(backend):
        coded = [(*quantize(s[0]), s[3], s[4], s[2]) for s in sets]

        def product(codes: Tensor, a_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return scaled_mm(codes, packed, a_scale, scale, bias, torch.bfloat16)

        gemm, whole = time_of(product, coded), time_of(linear_w4a4, sets)
        rotation = time_of(quantize, [(s[0],) for s in sets])
    tops = {"tops": gemm_operations(problem.m, problem.n, problem.k) / gemm / 1e12}
    moved = rotate_quantize_bytes(problem.m, problem.k)
    yield "gemm_w4a4", gemm, bf16, "F.linear bf16", tops
    yield "linear_w4a4", whole, bf16, "F.linear bf16", {}
    # the copy moves M * K * 4 bytes; scaled to the bytes that rotate_quantize moves
    scaled_copy = copy * moved / (problem.m * problem.k * 4)
    yield (
        "rotate_quantize",
        rotation,
        scaled_copy,
        "copy of the same bytes",
        {"gb_s": moved / rotation / 1e9, "prologue": "none"},
    )


def run(
    writer: Writer,
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    device: str,
    repeats: int,
    say: Callable[[str], None],
) -> None:
    """Every backend that can run on the device, over every shape; a row a case."""
    backends = [name for name, reason in available_backends(device).items() if reason is None]
    for m in tokens:
        for n, k in shapes:
            for backend in backends:
                for case, ours, baseline, name, more in measure(Problem(m, n, k, device), backend, repeats):
                    shape = {"M": m, "N": n, "K": k} if case != "rotate_quantize" else {"M": m, "K": k}
                    row = writer.write(case, shape, ours * 1e6, baseline * 1e6, "us", name, backend=backend, **more)
                    say(f"{case:16} {backend:10} M={m} N={n} K={k}: {ours * 1e6:.1f} us, {row['ratio']:.2f}x {name}")
