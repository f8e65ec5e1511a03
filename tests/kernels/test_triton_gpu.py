"""The Triton backend on a GPU, at the shapes of FLUX.1-dev: 4096 image and 512 text tokens, hidden size 3072."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import convrot_kernels as ck
from convrot_kernels import reference
from convrot_kernels.testing import assert_codes_close, assert_equal, make_codes, make_inputs, make_scale

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ROWS = [1, 512, 4096, 4608]
MATRICES = [(3072, 3072), (9216, 3072), (12288, 3072), (21504, 3072), (3072, 12288), (3072, 15360)]  # N, K


class Family(NamedTuple):
    """Shapes that share compilations: all that Triton asks of an extent is whether it is 1 or a multiple of 16."""

    m: list[int]
    n: list[int]
    k: list[int]
    scheme: tuple[int, int, bool]  # bits of a and of b, whether a is packed
    layout: str
    out_dtype: torch.dtype
    bias_dtype: torch.dtype | None


# at and off the edges of tiles (M 16 to 128, N 32 to 128, K 128); 960 shapes, 25 compilations
OFF = [2, 7, 15, 17, 33, 63, 65, 127, 255, 257, 1000, 4097]
ODD = {
    "halves": Family(
        [1, 16, 128, *OFF],
        [*(7, 31, 65, 130), *(16, 64, 128, 272)],
        [128, 256, 384, 896],
        *((4, 4, False), "halves128", torch.bfloat16, torch.float32),
    ),
    "wide": Family(
        OFF, [3, 31, 33, 63, 129, 250], [32, 96, 160, 288], *((8, 4, False), "row_major", torch.float16, None)
    ),
    "pairs": Family(
        OFF, [16, 32, 80, 144], [34, 130, 202, 330], *((4, 4, True), "row_major", torch.float32, torch.bfloat16)
    ),
}


@pytest.fixture(autouse=True)
def _triton() -> Any:
    with ck.use_backend("triton"):
        yield


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("k", [3072, 12288, 15360])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_every_width(m: int, k: int, bits: int, dtype: torch.dtype) -> None:
    x = make_inputs(m, k, dtype=dtype, device="cuda")
    expected = reference.rotate_quantize(x, 256, bits)
    actual = ck.rotate_quantize(x, 256, bits)
    assert_codes_close(actual, expected)
    again = ck.rotate_quantize(x, 256, bits)
    assert_equal(again[0], actual[0])
    assert_equal(again[1], actual[1])


@pytest.mark.parametrize("group_size", reference.GROUP_SIZES)
@pytest.mark.parametrize("packed", [False, True])
def test_codes_of_every_group_size(group_size: int, packed: bool, dtype: torch.dtype) -> None:
    x = make_inputs(777, 9216, dtype=dtype, device="cuda")
    expected = reference.rotate_quantize(x, group_size, packed=packed, clip=0.8)
    assert_codes_close(ck.rotate_quantize(x, group_size, packed=packed, clip=0.8), expected)
    rotated, exact = ck.rotate(x.float(), group_size), reference.rotate(x.float(), group_size)
    torch.testing.assert_close(rotated, exact, rtol=0, atol=float(exact.abs().max()) * 2**-21)


@pytest.mark.parametrize("m", [512, 4096])
@pytest.mark.parametrize("packed", [False, True])
def test_prologues_of_the_blocks(m: int, packed: bool) -> None:
    hidden, mlp = make_inputs(m, 3072, device="cuda"), make_inputs(m, 12288, device="cuda", seed=1)
    for op, arguments in (
        ("rotate_quantize_gelu", (mlp,)),
        ("rotate_quantize_cat_gelu", (hidden, mlp)),
        ("rotate_quantize_silu_mul", (mlp, mlp.flip(0))),
    ):
        expected = getattr(reference, op)(*arguments, packed=packed)
        assert_codes_close(getattr(ck, op)(*arguments, packed=packed), expected, prologue=True)
    gain, shift = _random(2, 1, 3072)
    codes, scale = ck.rotate_quantize_modulate(hidden[None], gain, shift)
    expected_codes, expected_scale = reference.rotate_quantize_modulate(hidden[None], gain, shift)
    assert (codes != expected_codes).float().mean() < 2e-3
    torch.testing.assert_close(scale, expected_scale, rtol=2e-3, atol=0)


@pytest.mark.parametrize("m", [*ROWS, 17, 129, 1000])
@pytest.mark.parametrize(("n", "k"), MATRICES)
@pytest.mark.parametrize("layout", ["row_major", "halves128"])
def test_products_equal_reference(m: int, n: int, k: int, layout: str) -> None:
    a_scale, b_scale, bias = make_scale(m, device="cuda"), make_scale(n, device="cuda"), _random(n)
    a8 = make_codes(m, k, bits=8, device="cuda")
    a4, b = make_codes(m, k, device="cuda"), ck.pack_int4(make_codes(n, k, device="cuda", seed=1))
    weight = ck.prepare_weight(b, layout)
    for a in (a4, a8, ck.pack_int4(a4)):
        expected = reference.scaled_mm(a, b, a_scale, b_scale, bias)
        assert_equal(ck.scaled_mm(a, weight, a_scale, b_scale, bias, b_layout=layout), expected)
    gate, residual = _random(n), _random(m, n)
    expected = reference.scaled_mm_gate_residual(a4, b, a_scale, b_scale, bias, gate, residual)
    actual = ck.scaled_mm_gate_residual(a4, weight, a_scale, b_scale, bias, gate, residual, b_layout=layout)
    assert_equal(actual, expected)


@pytest.mark.parametrize("family", list(ODD))
def test_products_of_odd_shapes_are_bit_equal(family: str, assert_product: Callable[..., None]) -> None:
    rows, columns, depths, *how = ODD[family]
    for shape in itertools.product(rows, columns, depths):
        assert_product(ck.scaled_mm, shape, *how)


@pytest.mark.parametrize("m", [1, 100, 4608])
def test_w8a8_equals_reference(m: int) -> None:
    a, b = make_codes(m, 3072, bits=8, device="cuda"), make_codes(9216, 3072, bits=8, device="cuda", seed=1)
    a_scale, b_scale = make_scale(m, device="cuda"), make_scale(9216, device="cuda")
    for out_dtype in (torch.float32, torch.bfloat16):
        expected = reference.scaled_mm(a, b, a_scale, b_scale, out_dtype=out_dtype)
        assert_equal(ck.scaled_mm(a, b, a_scale, b_scale, out_dtype=out_dtype), expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_sums_stay_exact(sign: int) -> None:
    k = 65536
    a = torch.full((130, k), -128, dtype=torch.int8, device="cuda")
    b = ck.prepare_weight(ck.pack_int4(torch.full((140, k), sign * 7, dtype=torch.int8, device="cuda")), "halves128")
    ones = torch.ones(140, device="cuda")
    out = ck.scaled_mm(a, b, ones[:130], ones, out_dtype=torch.float32, b_layout="halves128")
    assert (out == -128.0 * 7 * sign * k).all()


@pytest.mark.parametrize("m", [1, 16, 512])
@pytest.mark.parametrize("layout", ["row_major", "halves128"])
def test_values_are_summed_in_fp32(m: int, layout: str, dtype: torch.dtype) -> None:
    a, b = make_inputs(m, 3072, dtype=dtype, device="cuda"), make_codes(18432, 3072, device="cuda")
    b_scale, weight = make_scale(18432, device="cuda"), ck.prepare_weight(ck.pack_int4(b), layout)
    actual = ck.scaled_mm(a, weight, None, b_scale, out_dtype=torch.float32, b_layout=layout)
    exact = (a.double() @ b.double().t()) * b_scale
    bound = (a.double().abs() @ b.double().abs().t()) * b_scale * 1e-6
    assert ((actual - exact).abs() <= bound).all()


def test_rows_beyond_two_to_the_31_elements() -> None:
    whole = torch.empty(3, 2**31 // 2 + 256, dtype=torch.bfloat16, device="cuda")  # the last row starts above 2^31
    x = whole[:, :512]
    x.copy_(make_inputs(3, 512, device="cuda"))
    codes, scale = ck.rotate_quantize(x)
    expected, expected_scale = ck.rotate_quantize(x.contiguous())
    assert_equal(codes, expected)
    assert_equal(scale, expected_scale)
    assert_equal(ck.rotate(x), ck.rotate(x.contiguous()))


def test_captured_and_replayed() -> None:
    x, weight = make_inputs(64, 3072, device="cuda"), ck.pack_int4(make_codes(3072, 3072, device="cuda"))
    weight, b_scale = ck.prepare_weight(weight, "halves128"), make_scale(3072, device="cuda")

    def layer() -> Tensor:
        codes, scale = ck.rotate_quantize(x)
        return ck.scaled_mm(codes, weight, scale, b_scale, b_layout="halves128")

    expected = layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    out.zero_()
    graph.replay()
    assert_equal(out, expected)


def test_on_another_stream() -> None:
    x = make_inputs(512, 3072, device="cuda")
    expected = ck.rotate_quantize(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = ck.rotate_quantize(x)
    stream.synchronize()
    assert_equal(actual[0], expected[0])
