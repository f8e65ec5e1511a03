"""What tests and benchmarks share: inputs, exact comparisons, timing, byte and operation counts."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from convrot_kernels.ops import unpack_int4

MISMATCHES = 1e-5  # the share of codes by which a backend may differ from reference, each by one step; one is chance
SCALE_RTOL = 1e-5
# After a prologue, the share of rows whose scale may be further off: its one rounding to 16 bits falls the other way
# for a few inputs (two fp32 functions differ by 1e-7), and the row's maximum may hang on one of them.
FLIPPED_ROWS, FLIPPED_RTOL = 2e-3, 2.0**-8


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


def assert_codes_close(
    actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], *, prologue: bool = False
) -> None:
    """(codes, scale) of a backend and of reference: 1e-5 of the codes (or one) off by one step; scale within 1e-5.

    After a prologue, FLIPPED_ROWS of the scales may be off by FLIPPED_RTOL.
    """
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
    scale, wanted_scale = scale.cpu(), wanted_scale.cpu()
    if prologue:
        moved = (scale - wanted_scale).abs() > SCALE_RTOL * wanted_scale
        count = int(moved.sum())
        assert count <= FLIPPED_ROWS * moved.numel(), f"{count} of {moved.numel()} scales are off by more than 1e-5"
    rtol = FLIPPED_RTOL if prologue else SCALE_RTOL
    torch.testing.assert_close(scale, wanted_scale, rtol=rtol, atol=0, equal_nan=True)


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


def time_graphs(
    contenders: Mapping[str, tuple[Callable[..., Any], Sequence[tuple[Any, ...]]]],
    *,
    seconds: float = 0.18,
    rounds: int = 2,
) -> dict[str, float]:
    """{name: (function, argument sets)} -> {name: median seconds a call}, sustained, as CUDA graphs, in one run.

    A contender's graph goes round its argument sets: give as many as exceed the cache. Every round runs each contender
    for `seconds` untimed, so that clocks and power settle under its own load, and for `seconds` timed; the next round
    takes them in the opposite order. Nothing is checked here: compare the results first.
    """
    graphs = {name: _capture(function, arguments) for name, (function, arguments) in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds):
        names = list(graphs) if turn % 2 == 0 else list(reversed(graphs))
        for name in names:
            graph, calls = graphs[name]
            once = _replay(graph, 3)[-1]
            _replay(graph, max(3, int(seconds / once)))
            samples[name] += [sample / calls for sample in _replay(graph, max(5, int(seconds / once)))]
    return {name: median(values) for name, values in samples.items()}


def _capture(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """-> the graph of one call for each argument set, all of them repeated until it runs for a millisecond; calls."""
    for some in arguments[:3]:
        function(*some)
    torch.cuda.synchronize()

    def of(calls: Sequence[tuple[Any, ...]]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for some in calls:
                function(*some)
        return graph

    graph = of(arguments)
    repeats = round(1e-3 / _replay(graph, 3)[-1])
    return (of(list(arguments) * repeats), repeats * len(arguments)) if repeats > 1 else (graph, len(arguments))


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    """Seconds of each of `times` replays, back to back."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def time_host(function: Callable[..., Any], arguments: tuple[Any, ...], *, calls: int = 1000) -> float:
    """Mean seconds that the host spends to enqueue function(*arguments) on a GPU, without waiting for it."""
    for _ in range(50):
        function(*arguments)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls


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
