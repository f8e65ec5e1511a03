from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convrot_kernels import pack_int4, scaled_mm, scaled_mm_gate_residual
from convrot_kernels.testing import assert_equal, make_codes, make_inputs, make_scale

OP = "scaled_mm_gate_residual"
SHAPES = [
    ((), (24,)),
    ((5,), (24,)),
    ((5,), (5, 24)),
    ((2, 17), (2, 24)),
    ((2, 3, 4), (2, 24)),
    ((2, 3, 4), (24,)),
    ((2, 0), (2, 24)),
    ((0,), (24,)),
]


@pytest.mark.parametrize(("rows", "vector"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_integer_product_then_gate_then_residual(
    backend: str,
    device: str,
    dtype: torch.dtype,
    rows: tuple[int, ...],
    vector: tuple[int, ...],
    with_bias: bool,
    plain_product: Callable[..., Tensor],
) -> None:
    a, b = make_codes(*rows, 512, device=device), make_codes(24, 512, device=device, seed=1)
    a_scale, b_scale = make_scale(*rows, device=device), make_scale(24, device=device, seed=1)
    bias = torch.randn(24, device=device) if with_bias else None
    gate = torch.randn(vector, device=device).to(dtype)
    residual = torch.randn(*rows, 24, device=device).to(dtype)
    actual = scaled_mm_gate_residual(a, pack_int4(b), a_scale, b_scale, bias, gate, residual)
    y = plain_product(a, b, a_scale, b_scale, bias)
    wide = gate.cpu().float() if gate.dim() == 1 else gate.cpu().float().view(len(gate), *[1] * (y.dim() - 2), 24)
    assert_equal(actual.cpu(), (residual.cpu().float() + wide * y).to(dtype))


def test_gate_and_residual_may_have_different_dtypes(backend: str, device: str) -> None:
    a, b = make_codes(2, 3, 64, device=device), pack_int4(make_codes(8, 64, device=device))
    a_scale, b_scale = make_scale(2, 3, device=device), make_scale(8, device=device)
    gate, residual = torch.randn(2, 8, device=device), torch.randn(2, 3, 8, device=device).half()
    actual = scaled_mm_gate_residual(a, b, a_scale, b_scale, None, gate, residual)
    y = scaled_mm(a, b, a_scale, b_scale, out_dtype=torch.float32)
    assert_equal(actual, (residual.float() + gate[:, None] * y).half())


def test_values_without_scale(backend: str, device: str) -> None:
    a, b = make_inputs(2, 3, 256, device=device), pack_int4(make_codes(8, 256, device=device))
    b_scale, bias = make_scale(8, device=device), torch.randn(8, device=device)
    gate, residual = torch.randn(2, 8, device=device), torch.randn(2, 3, 8, device=device)
    actual = scaled_mm_gate_residual(a, b, None, b_scale, bias, gate, residual)
    y = scaled_mm(a, b, None, b_scale, bias, torch.float32)
    assert_equal(actual, residual + gate[:, None] * y)


def test_broken_rows_touch_no_other_row_and_inputs_stay(backend: str, device: str) -> None:
    a, b = make_codes(4, 64, device=device), pack_int4(make_codes(8, 64, device=device))
    a_scale, b_scale = make_scale(4, device=device), make_scale(8, device=device)
    gate, residual = torch.randn(8, device=device), torch.randn(4, 8, device=device)
    before = residual.clone()
    expected = scaled_mm_gate_residual(a, b, a_scale, b_scale, None, gate, residual)
    a_scale[1], expected[1] = float("nan"), float("nan")
    assert_equal(scaled_mm_gate_residual(a, b, a_scale, b_scale, None, gate, residual), expected)
    assert_equal(residual, before)


def test_non_contiguous_gate_and_residual(backend: str, device: str) -> None:
    a, b = make_codes(2, 3, 64, device=device), pack_int4(make_codes(8, 64, device=device))
    a_scale, b_scale = make_scale(2, 3, device=device), make_scale(8, device=device)
    gate, residual = torch.randn(2, 24, device=device)[:, 8:16], torch.randn(3, 2, 8, device=device).transpose(0, 1)
    expected = scaled_mm_gate_residual(a, b, a_scale, b_scale, None, gate.contiguous(), residual.contiguous())
    assert_equal(scaled_mm_gate_residual(a, b, a_scale, b_scale, None, gate, residual), expected)
