from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convrot_kernels import pack_int4, scaled_mm
from convrot_kernels.testing import assert_equal, make_codes, make_inputs, make_scale

OP = "scaled_mm"
Product = Callable[..., Tensor]

# activation bits, weight bits, packed activations
SCHEMES = [(4, 4, False), (4, 4, True), (8, 4, False), (8, 8, False), (4, 8, True)]


def _store(codes: Tensor, packed: bool) -> Tensor:
    return pack_int4(codes) if packed else codes


@pytest.mark.parametrize(("a_bits", "b_bits", "packed"), SCHEMES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 16), (17, 48, 1088), (5, 350, 3072), (3, 33, 15360), (0, 8, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_integer_product(
    backend: str,
    device: str,
    m: int,
    n: int,
    k: int,
    a_bits: int,
    b_bits: int,
    packed: bool,
    with_bias: bool,
    plain_product: Product,
) -> None:
    a, b = make_codes(m, k, bits=a_bits, device=device), make_codes(n, k, bits=b_bits, device=device, seed=1)
    a_scale, b_scale = make_scale(m, device=device), make_scale(n, device=device, seed=1)
    bias = torch.randn(n, device=device) if with_bias else None
    expected = plain_product(a, b, a_scale, b_scale, bias)
    for out_dtype in (torch.float32, torch.float16, torch.bfloat16):
        actual = scaled_mm(_store(a, packed), _store(b, b_bits == 4), a_scale, b_scale, bias, out_dtype)
        assert_equal(actual.cpu(), expected.to(out_dtype))


@pytest.mark.parametrize(("a_bits", "b_bits", "packed"), SCHEMES)
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_one_sign_stay_exact(
    backend: str, device: str, a_bits: int, b_bits: int, packed: bool, sign: int, plain_product: Product
) -> None:
    k = 20480  # W4A8 and W8A8 leave the integers that fp32 holds
    a = torch.full((3, k), -(2 ** (a_bits - 1)), dtype=torch.int8, device=device)
    b = torch.full((4, k), sign * (2 ** (b_bits - 1) - 1), dtype=torch.int8, device=device)
    a[1, 5], a[2, ::3], b[2, 100] = 1, 3, -1
    ones = torch.ones(4, device=device)
    expected = plain_product(a, b, ones[:3], ones)
    actual = scaled_mm(_store(a, packed), _store(b, b_bits == 4), ones[:3], ones, out_dtype=torch.float32)
    assert_equal(actual.cpu(), expected)


def test_w8a8_sums_are_rounded_once(backend: str, device: str, plain_product: Product) -> None:
    a = torch.full((1, 3072), 127, dtype=torch.int8, device=device)
    b = torch.full((1, 3072), 127, dtype=torch.int8, device=device)
    a[0, 1::2], b[0, :2] = 126, 1  # partial sums need more than 24 bits
    ones = torch.ones(1, device=device)
    expected = plain_product(a, b, ones, ones)
    assert expected.item() > 2**24
    assert_equal(scaled_mm(a, b, ones, ones, out_dtype=torch.float32).cpu(), expected)


def test_one_huge_channel(backend: str, device: str, plain_product: Product) -> None:
    a, b = torch.zeros(4, 512, dtype=torch.int8, device=device), make_codes(6, 512, device=device)
    a[:, 300] = 7
    a_scale, b_scale = make_scale(4, device=device) * 1e30, make_scale(6, device=device) * 1e7
    expected = plain_product(a, b, a_scale, b_scale)
    assert_equal(scaled_mm(a, pack_int4(b), a_scale, b_scale, out_dtype=torch.float32).cpu(), expected)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_of_any_float_dtype(backend: str, device: str, bias_dtype: torch.dtype, plain_product: Product) -> None:
    a, b = make_codes(9, 256, device=device), make_codes(16, 256, device=device, seed=1)
    a_scale, b_scale = make_scale(9, device=device), make_scale(16, device=device, seed=1)
    bias = torch.randn(16, device=device).to(bias_dtype)
    expected = plain_product(a, b, a_scale, b_scale, bias).to(torch.bfloat16)
    assert_equal(scaled_mm(a, pack_int4(b), a_scale, b_scale, bias).cpu(), expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [(), (1,), (3, 0), (2, 3), (2, 1, 3, 2)])
def test_leading_dimensions_of_any_rank(backend: str, device: str, rows: tuple[int, ...], packed: bool) -> None:
    a, b = _store(make_codes(*rows, 128, device=device), packed), pack_int4(make_codes(8, 128, device=device))
    a_scale, b_scale = make_scale(*rows, device=device), make_scale(8, device=device)
    actual = scaled_mm(a, b, a_scale, b_scale)
    assert actual.shape == (*rows, 8)
    flat = scaled_mm(a.reshape(-1, a.shape[-1]), b, a_scale.reshape(-1), b_scale)
    assert_equal(actual.reshape(-1, 8), flat)


def test_non_contiguous_operands(backend: str, device: str) -> None:
    a, b = make_codes(64, 12, device=device).t(), make_codes(16, 128, device=device)[::2, ::2]
    a_scale, b_scale = make_scale(24, device=device)[::2], make_scale(8, device=device).flip(0)
    packed = pack_int4(b).t().contiguous().t()
    bias = torch.randn(16, device=device)[::2]
    expected = scaled_mm(a.contiguous(), pack_int4(b), a_scale.contiguous(), b_scale, bias.contiguous())
    assert_equal(scaled_mm(a, packed, a_scale, b_scale, bias), expected)


def test_zero_rows_give_the_bias(backend: str, device: str) -> None:
    a, b = torch.zeros(2, 64, dtype=torch.int8, device=device), pack_int4(make_codes(8, 64, device=device))
    bias = torch.randn(8, device=device)
    actual = scaled_mm(a, b, torch.full((2,), 1e-10, device=device), make_scale(8, device=device), bias)
    assert_equal(actual, bias.bfloat16().expand(2, 8).contiguous())


def test_a_nan_scale_makes_its_row_nan_and_no_other(backend: str, device: str) -> None:
    a, b = make_codes(5, 64, device=device), pack_int4(make_codes(8, 64, device=device))
    a_scale, b_scale = make_scale(5, device=device), make_scale(8, device=device)
    expected = scaled_mm(a, b, a_scale, b_scale)
    a[3], a_scale[3], expected[3] = 0, float("nan"), float("nan")
    assert_equal(scaled_mm(a, b, a_scale, b_scale), expected)


def test_code_minus_8_decodes(backend: str, device: str) -> None:
    b = torch.full((1, 64), 0x88, dtype=torch.uint8, device=device)
    a, one = torch.ones(1, 128, dtype=torch.int8, device=device), torch.ones(1, device=device)
    assert scaled_mm(a, b, one, one, out_dtype=torch.float32).item() == -8 * 128


@pytest.mark.parametrize("b_bits", [4, 8])
@pytest.mark.parametrize("rows", [(), (1,), (0,), (2, 17)])
def test_values_without_scale_are_summed_in_fp32(
    backend: str, device: str, dtype: torch.dtype, b_bits: int, rows: tuple[int, ...]
) -> None:
    a, b = make_inputs(*rows, 3072, dtype=dtype, device=device), make_codes(40, 3072, bits=b_bits, device=device)
    b_scale, bias = make_scale(40, device=device), torch.randn(40, device=device, dtype=dtype)
    exact = (a.cpu().double() @ b.cpu().double().t()) * b_scale.cpu() + bias.cpu()
    bound = (a.cpu().double().abs() @ b.cpu().double().abs().t()) * b_scale.cpu() * 1e-6 + 1e-6
    actual = scaled_mm(a, _store(b, b_bits == 4), None, b_scale, bias, torch.float32).cpu()
    assert ((actual - exact).abs() <= bound).all()
    by_default = scaled_mm(a, _store(b, b_bits == 4), None, b_scale, bias)
    assert_equal(by_default.cpu(), actual.to(dtype))


def test_codes_give_bf16_by_default(device: str) -> None:
    a, b, one = make_codes(2, 64, device=device), make_codes(3, 64, device=device), torch.ones(3, device=device)
    assert scaled_mm(a, b, one[:2], one).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_no_global_precision_setting_changes_the_sums(
    backend: str, device: str, precision: str, plain_product: Product
) -> None:
    a, b = make_codes(64, 512, bits=8, device=device), make_codes(64, 512, bits=8, device=device, seed=1)
    a_scale, b_scale = make_scale(64, device=device), make_scale(64, device=device, seed=1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        actual = scaled_mm(a, b, a_scale, b_scale, out_dtype=torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_equal(actual.cpu(), plain_product(a, b, a_scale, b_scale))


@given(
    m=st.integers(0, 5),
    n=st.integers(1, 9),
    half_k=st.integers(1, 1500),
    scheme=st.sampled_from(SCHEMES),
    seed=st.integers(0, 2**31),
)
def test_any_size_is_exact(m: int, n: int, half_k: int, scheme: tuple[int, int, bool], seed: int) -> None:
    a_bits, b_bits, packed = scheme
    a, b = make_codes(m, 2 * half_k, bits=a_bits, seed=seed), make_codes(n, 2 * half_k, bits=b_bits, seed=seed + 1)
    a_scale, b_scale = make_scale(m, seed=seed), make_scale(n, seed=seed + 1)
    expected = ((a.long() @ b.long().t()).float() * a_scale[:, None]) * b_scale
    assert_equal(scaled_mm(_store(a, packed), _store(b, b_bits == 4), a_scale, b_scale), expected.bfloat16())
