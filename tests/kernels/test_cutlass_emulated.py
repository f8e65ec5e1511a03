"""sm_80's kernels against reference, bit for bit, on a GPU of compute capability 9.0 or higher that emulates s4.

The library lies in the folder $CONVROT_EMULATED (emulated.py makes it). Only correctness shows here: emulated s4 is 20
times slower than bf16, and outside this test no launcher picks it on 9.0 or higher.
"""

import itertools
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convrot_kernels import pack_int4, reference
from convrot_kernels.backends import cutlass
from convrot_kernels.backends.cutlass import build, library
from convrot_kernels.backends.cutlass.variants import of_arch
from convrot_kernels.testing import assert_codes_close, assert_equal, make_codes, make_inputs, make_scale

ARCH = "sm_80"
FOLDER = os.environ.get("CONVROT_EMULATED")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="CONVROT_EMULATED names no folder: python tests/kernels/emulated.py"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

OUTS = [torch.bfloat16, torch.float16]
S4, S8 = "s4", "s8"
M = [1, 2, 8, 9, 16, 17, 63, 64, 65, 127, 128, 129, 200, 255, 257, 300]
N = [8, 16, 24, 40, 72, 128, 136, 256, 264, 512]  # multiples of 8: rows of 16 bytes
K = {S4: [32, 64, 96, 128, 160, 256, 416, 1024], S8: [16, 32, 48, 64, 80, 192, 272, 1024]}


class _Recorder:
    """The library, with the names of the kernels that were launched."""

    def __init__(self, ours: library.Library) -> None:
        self.ours, self.names = ours, list[str]()

    def call(self, name: str, *arguments: Any) -> None:
        self.names.append(name)
        self.ours.call(name, *arguments)


@pytest.fixture(scope="module")
def emulated() -> library.Library:
    """The library of these very sources: one of others fails, it is not skipped."""
    found = list(Path(FOLDER or "").glob(f"*{build.source_key(ARCH)}*.so"))
    assert found, f"no library of these sources in {FOLDER}: run python tests/kernels/emulated.py {FOLDER}"
    return library.Library(found[0], ARCH)


@pytest.fixture
def recorder(emulated: library.Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Recorder]:
    """In force, the launcher believes that the GPU is an sm_80."""
    recorder = _Recorder(emulated)
    monkeypatch.setattr(library, "of", lambda device: (ARCH, recorder))
    yield recorder
    torch.cuda.synchronize()


def _problem(m: int, n: int, k: int, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bits, seed = int(kind[1:]), zlib.crc32(f"{m} {n} {k}".encode())
    a, b = make_codes(m, k, bits=bits, seed=seed), make_codes(n, k, bits=bits, seed=seed + 1)
    a, b = (pack_int4(codes) if kind == S4 else codes for codes in (a, b))
    a_scale, b_scale = make_scale(m, seed=seed), make_scale(n, seed=seed + 1)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return a.cuda(), b.cuda(), a_scale.cuda(), b_scale.cuda(), bias.cuda()


def _gemms(kind: str, out: torch.dtype) -> set[str]:
    """The kernels that may run such a product: not the GEMV."""
    wanted = (kind, kind, {torch.bfloat16: "bf16", torch.float16: "fp16"}[out])
    return {found.name for found in of_arch(ARCH) if (found.weight, found.activation, found.out) == wanted}


@pytest.mark.parametrize("kind", [S4, S8])
@pytest.mark.parametrize("m", M)
def test_products_are_bit_equal(recorder: _Recorder, m: int, kind: str) -> None:
    for n, k, out in itertools.product(N, K[kind], OUTS):
        a, b, a_scale, b_scale, bias = _problem(m, n, k, kind)
        some_bias = (None, bias, bias.to(out))[(n + k) // 8 % 3]
        expected = reference.scaled_mm(a, b, a_scale, b_scale, some_bias, out)
        assert_equal(cutlass.scaled_mm(a, b, a_scale, b_scale, some_bias, out), expected)
        assert m < 64 or recorder.names[-1] in _gemms(kind, out)


@pytest.mark.parametrize("kind", [S4, S8])
@pytest.mark.parametrize("m", [5, 33, 300])
def test_extents_off_the_multiples_are_bit_equal(recorder: _Recorder, m: int, kind: str) -> None:
    for n, k, out in itertools.product([1, 7, 12, 100, 513], [16, 48, 80, 208, 1040], OUTS):
        a, b, a_scale, b_scale, bias = _problem(m, n, k, kind)
        expected = reference.scaled_mm(a, b, a_scale, b_scale, bias, out)
        assert_equal(cutlass.scaled_mm(a, b, a_scale, b_scale, bias, out), expected)


@pytest.mark.parametrize("kind", [S4, S8])
@pytest.mark.parametrize("m", [65, 150])
def test_bias_gate_and_residual_in_one_epilogue(recorder: _Recorder, m: int, kind: str) -> None:
    for out, batch, vectors in itertools.product(OUTS, (1, 2), (torch.float32, torch.bfloat16, torch.float16)):
        a, b, a_scale, b_scale, bias = _problem(batch * m, 264, 416, kind)
        a, a_scale = a.view(batch, m, -1), a_scale.view(batch, m)
        gate = torch.randn(batch, 264, device="cuda", dtype=vectors)
        residual = torch.randn(batch, m, 264, device="cuda").to(out)
        arguments = (a, b, a_scale, b_scale, bias.to(vectors), gate, residual)
        expected = reference.scaled_mm_gate_residual(*arguments)
        assert_equal(cutlass.scaled_mm_gate_residual(*arguments), expected)
        assert set(recorder.names[-batch:]) <= _gemms(kind, out)


@pytest.mark.parametrize("kind", [S4, S8])
def test_output_in_a_slice_leaves_its_surroundings_alone(recorder: _Recorder, kind: str) -> None:
    a, b, a_scale, b_scale, bias = _problem(130, 264, 416, kind)
    for out, first in itertools.product(OUTS, (0, 8, 3)):
        whole = torch.full((132, 528), 7.0, dtype=out, device="cuda")
        expected, view = whole.clone(), (slice(1, 131), slice(first, first + 264))
        expected[view] = reference.scaled_mm(a, b, a_scale, b_scale, bias, out)
        cutlass.scaled_mm_out(whole[view], a, b, a_scale, b_scale, bias)
        assert_equal(whole, expected)


@pytest.mark.parametrize("kind", [S4, S8])
@pytest.mark.parametrize("pair", [(-1, -1), (-1, 1), (1, 1)])
def test_the_longest_sums_do_not_saturate(recorder: _Recorder, kind: str, pair: tuple[int, int]) -> None:
    low = -(2 ** (int(kind[1:]) - 1))  # -8 or -128, which a weight of a file may hold
    values = [low if sign < 0 else -low - 1 for sign in pair]
    a, b = (torch.full((rows, 15360), value, dtype=torch.int8) for rows, value in zip((130, 256), values, strict=True))
    a, b = ((pack_int4(codes) if kind == S4 else codes).cuda() for codes in (a, b))
    ones = torch.ones(256, device="cuda")
    for out in OUTS:
        scale = ones / 2**14  # into the range of fp16
        expected = reference.scaled_mm(a, b, ones[:130], scale, None, out)
        assert_equal(cutlass.scaled_mm(a, b, ones[:130], scale, None, out), expected)
        assert recorder.names[-1] in _gemms(kind, out)


@pytest.mark.parametrize("dtype", [torch.float32, *OUTS])
def test_a_layer_quantized_and_multiplied_here(recorder: _Recorder, dtype: torch.dtype) -> None:
    x, weight = make_inputs(77, 1024, dtype=dtype, device="cuda"), make_inputs(512, 1024, seed=1, device="cuda")
    for bits, packed in ((4, True), (8, False)):
        codes, scale = cutlass.rotate_quantize(x, bits=bits, packed=packed)
        assert_codes_close((codes, scale), reference.rotate_quantize(x, bits=bits, packed=packed))
        b, b_scale = reference.rotate_quantize(weight, bits=bits, packed=packed)
        for out in OUTS:
            expected = reference.scaled_mm(codes, b, scale, b_scale, None, out)
            assert_equal(cutlass.scaled_mm(codes, b, scale, b_scale, None, out), expected)
