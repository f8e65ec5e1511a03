from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convrot_kernels import pack_int4, scaled_mm, scaled_mm_out
from convrot_kernels.testing import assert_equal, make_codes, make_inputs, make_scale

OP = "scaled_mm_out"
GUARD = 777.0


def _operands(device: str, *rows: int, n: int = 24, k: int = 256) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b = make_codes(*rows, k, device=device), pack_int4(make_codes(n, k, device=device, seed=1))
    return a, b, make_scale(*rows, device=device), make_scale(n, device=device, seed=1), torch.randn(n, device=device)


def test_equals_the_integer_product(
    backend: str, device: str, dtype: torch.dtype, plain_product: Callable[..., Tensor]
) -> None:
    a, b, a_scale, b_scale, bias = _operands(device, 33)
    out = torch.empty(33, 24, dtype=dtype, device=device)
    scaled_mm_out(out, a, b, a_scale, b_scale, bias)
    codes = make_codes(24, 256, device=device, seed=1)
    assert_equal(out.cpu(), plain_product(a, codes, a_scale, b_scale, bias).to(dtype))


@pytest.mark.parametrize("rows", [(9,), (2, 3), (0,)])
def test_slices_of_a_larger_tensor_keep_their_surroundings(
    backend: str, device: str, dtype: torch.dtype, rows: tuple[int, ...]
) -> None:
    a, b, a_scale, b_scale, bias = _operands(device, *rows)
    whole = torch.full((rows[0] + 2, *rows[1:], 64), GUARD, dtype=dtype, device=device)
    expected = whole.clone()
    expected[1:-1, ..., 8:32] = scaled_mm(a, b, a_scale, b_scale, bias, dtype)
    scaled_mm_out(whole[1:-1, ..., 8:32], a, b, a_scale, b_scale, bias)
    assert_equal(whole, expected)


def test_every_second_row(backend: str, device: str) -> None:
    a, b, a_scale, b_scale, bias = _operands(device, 5)
    whole = torch.full((10, 24), GUARD, dtype=torch.bfloat16, device=device)
    scaled_mm_out(whole[::2], a, b, a_scale, b_scale, bias)
    assert_equal(whole[::2].contiguous(), scaled_mm(a, b, a_scale, b_scale, bias))
    assert (whole[1::2] == GUARD).all()


def test_one_dimension_and_no_bias(backend: str, device: str) -> None:
    a, b, a_scale, b_scale, _ = _operands(device)
    out = torch.empty(24, dtype=torch.float32, device=device)
    scaled_mm_out(out, a, b, a_scale, b_scale)
    assert_equal(out, scaled_mm(a, b, a_scale, b_scale, out_dtype=torch.float32))


def test_values_without_scale(backend: str, device: str, dtype: torch.dtype) -> None:
    a, b = make_inputs(7, 256, dtype=dtype, device=device), pack_int4(make_codes(24, 256, device=device))
    out = torch.empty(7, 24, dtype=dtype, device=device)
    scaled_mm_out(out, a, b, None, make_scale(24, device=device))
    assert_equal(out, scaled_mm(a, b, None, make_scale(24, device=device)))


def test_a_bias_that_requires_grad_leaves_no_graph_on_out(backend: str, device: str) -> None:
    a, b, a_scale, b_scale, bias = _operands(device, 3)
    out = torch.empty(3, 24, device=device)
    scaled_mm_out(out, a, b, a_scale, b_scale, bias.requires_grad_())
    assert not out.requires_grad


def test_writing_is_seen_by_autograd(device: str) -> None:
    a, b, a_scale, b_scale, bias = _operands(device, 3)
    out = torch.empty(3, 24, device=device)
    product = torch.ones(3, 24, device=device, requires_grad=True) * out  # saves out
    scaled_mm_out(out, a, b, a_scale, b_scale, bias)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
