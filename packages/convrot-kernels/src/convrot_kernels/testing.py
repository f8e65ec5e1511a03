"""What tests and benchmarks share: inputs, exact comparisons, timing, byte and operation counts."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from convrot_kernels.ops import unpack_int4

MISMATCHES = 1e-5  # the share of codes by which a backend may differ from reference, each by one step; one is chance
SCALE_RTOL = 1e-5


# inputs


def make_inputs(
    *shape: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor:
    """-> (..., K): Gaussian with the two outliers of a diffusion transformer, channels x20 and tokens with a mean of 6.

    1 in 128 channels (at least one) and 1 in 16 tokens; the same values on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    rows, k = x.shape[:-1].numel(), shape[-1]
    channels = torch.randperm(k, generator=generator)[: max(1, k // 128)]
    tokens = torch.randperm(rows, generator=generator)[: rows // 16]
    x[..., channels] *= 20
    x.view(rows, k)[tokens] += 6
    return x.to(dtype).to(device)


def make_codes(*shape: int, bits: int = 4, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """-> int8 (...): uniform codes in [-7, 7] (bits=4) or [-127, 127] (bits=8)."""
    qmax = 2 ** (bits - 1) - 1
    codes = torch.randint(-qmax, qmax + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return codes.to(device)


def make_scale(*shape: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """-> fp32 (...): positive, over two decades, with full mantissas."""
    return (10 ** torch.empty(shape).uniform_(-3, -1, generator=torch.Generator().manual_seed(seed))).to(device)


# comparisons


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Shape, dtype and every element (NaN equals NaN); the message counts and shows the differences."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    differs = (actual != expected) & ~(actual.isnan() & expected.isnan())
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        got, wanted = actual[first].item(), expected[first].item()
        count = int(differs.sum())
        raise AssertionError(
            f"{count} of {differs.numel()} elements differ; first at {first}: {got} instead of {wanted}"
        )


def assert_codes_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """(codes, scale) of a backend and of reference: 1e-5 of the codes (or one) off by one step; scale within 1e-5."""
    (codes, scale), (wanted, wanted_scale) = actual, expected
    assert codes.dtype == wanted.dtype, f"codes {codes.dtype}, expected {wanted.dtype}"
    assert codes.shape == wanted.shape, f"codes {tuple(codes.shape)}, expected {tuple(wanted.shape)}"
    if codes.dtype == torch.uint8:
        codes, wanted = unpack_int4(codes), unpack_int4(wanted)
    steps = (codes.detach().cpu().int() - wanted.detach().cpu().int()).abs()
    off, furthest = int((steps > 0).sum()), int(steps.max()) if steps.numel() else 0
    assert furthest <= 1, f"{off} of {steps.numel()} codes differ, one by {furthest} steps"
    assert off <= max(1, MISMATCHES * steps.numel()), (
        f"{off} of {steps.numel()} codes differ, allowed are {MISMATCHES:g} of them"
    )
    torch.testing.assert_close(scale.cpu(), wanted_scale.cpu(), rtol=SCALE_RTOL, atol=0, equal_nan=True)


# timing


def time_median(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, repeats: int = 20, warmup: int = 3
) -> float:
    """Median seconds of function(*arguments[i]); give several sets of tensors so that no call finds its data in cache.

    CUDA events where the first tensor is on a GPU, perf_counter elsewhere.
    """
    device = next((value.device for value in arguments[0] if isinstance(value, Tensor)), torch.device("cpu"))
    clock = _time_cuda if device.type == "cuda" else _time_cpu
    for index in range(warmup):
        function(*arguments[index % len(arguments)])
    return median(clock(function, arguments[index % len(arguments)]) for index in range(repeats))


def _time_cpu(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def _time_cuda(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# counts


def gemm_operations(m: int, n: int, k: int) -> int:
    """Multiplications and additions of an (M, K) x (N, K) product."""
    return 2 * m * n * k


def gemm_bytes(m: int, n: int, k: int, *, a_bits: int = 4, b_bits: int = 4, out_bits: int = 16) -> int:
    """Least bytes moved by scaled_mm: both operands, fp32 scales (of codes), a 16-bit bias, the result."""
    scales = 4 * n + (4 * m if a_bits <= 8 else 0)
    return (m * k * a_bits + n * k * b_bits + m * n * out_bits) // 8 + scales + 2 * n


def rotate_quantize_bytes(m: int, k: int, *, in_bits: int = 16, code_bits: int = 8, inputs: int = 1) -> int:
    """Least bytes moved by rotate_quantize: `inputs` tensors read, codes (8 bits each, 4 packed) and scale written."""
    return m * k * (in_bits * inputs + code_bits) // 8 + 4 * m
