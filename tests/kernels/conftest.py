"""Independent definitions: dense fp64 rotation, int64 products, the epilogue step by step. None calls an op.

And what the tests of several GPU backends share: random products, and their comparison with reference.
"""

import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from convrot_kernels import pack_int4, prepare_weight, reference
from convrot_kernels.backends.cutlass import library
from convrot_kernels.testing import assert_equal, make_codes, make_scale

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def _hadamard(n: int) -> Tensor:
    """Entry (i, j) is -1 to the number of base-4 digits of i and j that add up to 3, over sqrt(n)."""
    index, minus, place = torch.arange(n), torch.zeros(n, n, dtype=torch.int64), 1
    while place < n:
        digit = index.div(place, rounding_mode="floor") % 4
        minus += digit[:, None] + digit[None, :] == 3
        place *= 4
    return torch.where(minus % 2 == 1, -1.0, 1.0).double() / n**0.5


@pytest.fixture(params=FLOATS, ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of values."""
    result: torch.dtype = request.param
    return result


@pytest.fixture
def dense_rotation() -> Callable[[Tensor, int], Tensor]:
    """(..., K), group_size -> fp64 (..., K)."""

    def rotation(x: Tensor, group_size: int) -> Tensor:
        groups = x.detach().cpu().double().unflatten(-1, (-1, group_size))
        return (groups @ _hadamard(group_size)).flatten(-2)

    return rotation


@pytest.fixture
def plain_quantizer(dense_rotation: Callable[[Tensor, int], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """(..., K) -> codes int8 (..., K), scale fp32 (...), for finite rows."""

    def quantizer(x: Tensor, group_size: int = 256, bits: int = 4, clip: float = 1.0) -> tuple[Tensor, Tensor]:
        rotated, qmax = dense_rotation(x, group_size).float(), 2 ** (bits - 1) - 1
        scale = torch.clamp(clip * rotated.abs().max(-1).values / qmax, min=1e-10)
        return torch.clamp(torch.round(rotated / scale[..., None]), -qmax, qmax).to(torch.int8), scale

    return quantizer


@pytest.fixture
def plain_product() -> Callable[..., Tensor]:
    """int8 (..., K) x int8 (N, K) -> fp32 (..., N) before the last rounding; the sum in int64."""

    def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None = None) -> Tensor:
        total = (a.cpu().long() @ b.cpu().long().t()).to(torch.float32)
        out = (total * a_scale.cpu()[..., None]) * b_scale.cpu()
        return out if bias is None else out + bias.cpu().float()

    return product


@pytest.fixture
def problem() -> Callable[..., tuple[Tensor, ...]]:
    """m, n, k, bits of a and of b -> a int8 (M, K), b int8 (N, K), a_scale, b_scale, bias fp32; the same every time."""

    def make(m: int, n: int, k: int, a_bits: int = 4, b_bits: int = 4, device: str = "cuda") -> tuple[Tensor, ...]:
        seed = zlib.crc32(f"{m} {n} {k}".encode())
        a, b = make_codes(m, k, bits=a_bits, seed=seed), make_codes(n, k, bits=b_bits, seed=seed + 1)
        scales = make_scale(m, seed=seed), make_scale(n, seed=seed + 1)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        return tuple(tensor.to(device) for tensor in (a, b, *scales, bias))

    return make


@pytest.fixture
def assert_product(problem: Callable[..., tuple[Tensor, ...]]) -> Callable[..., None]:
    """A backend's scaled_mm at one shape against reference, bit for bit."""

    def check(
        scaled_mm: Callable[..., Tensor],
        shape: tuple[int, int, int],
        scheme: tuple[int, int, bool],
        layout: str,
        out_dtype: torch.dtype,
        bias_dtype: torch.dtype | None,
    ) -> None:
        a_bits, b_bits, packed = scheme
        a, b, a_scale, b_scale, bias = problem(*shape, a_bits, b_bits)
        a, b = pack_int4(a) if packed else a, prepare_weight(pack_int4(b) if b_bits == 4 else b, layout)
        some_bias = None if bias_dtype is None else bias.to(bias_dtype)
        expected = reference.scaled_mm(a, b, a_scale, b_scale, some_bias, out_dtype, b_layout=layout)
        assert_equal(scaled_mm(a, b, a_scale, b_scale, some_bias, out_dtype, b_layout=layout), expected)

    return check


@cache
def _why_no_cuda_on_cpu() -> str:
    if shutil.which("g++") is None:
        return "g++ is not on PATH"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True).stdout.strip()
    return "" if int(version.partition(".")[0]) >= 12 else f"_Float16 in C++ needs g++ 12, found {version}"


@pytest.fixture(scope="module")
def on_cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module's SOURCE, a file of csrc/, compiled for this CPU."""
    if why_not := _why_no_cuda_on_cpu():
        pytest.skip(why_not)
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import cuda_on_cpu
    finally:
        sys.path.pop(0)
    source = request.module.SOURCE
    path = tmp_path_factory.mktemp("on_cpu") / f"{source}.so"
    cuda_on_cpu.compile_for_cpu(source, path)
    return cuda_on_cpu.OnCpu(path)


@pytest.fixture
def cpu_kernels(on_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library's functions, none of them called yet; that one is, a test has to see to."""
    monkeypatch.setattr(library, "of", lambda device: ("sm_90a", on_cpu))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    on_cpu.names.clear()
    yield on_cpu
    assert on_cpu.names, "something else computed"
