from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convrot_kernels import pack_int4, prepare_weight, scaled_mm, scaled_mm_cat
from convrot_kernels.layouts import LAYOUTS
from convrot_kernels.testing import assert_equal, make_codes, make_inputs, make_scale

OP = "scaled_mm_cat"
WIDTHS = (48, 16, 80)


def _weights(device: str, k: int = 256) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    codes = [make_codes(n, k, device=device, seed=n) for n in WIDTHS]
    scales = [make_scale(n, device=device, seed=n) for n in WIDTHS]
    return codes, scales, [torch.linspace(-n, n, n, device=device) for n in WIDTHS]


@pytest.mark.parametrize("rows", [(1,), (2, 3), (33,)])
def test_equals_the_integer_products_side_by_side(
    backend: str, device: str, dtype: torch.dtype, rows: tuple[int, ...], plain_product: Callable[..., Tensor]
) -> None:
    codes, scales, bias = _weights(device)
    a, a_scale = make_codes(*rows, 256, device=device), make_scale(*rows, device=device)
    out = scaled_mm_cat(a, [pack_int4(b) for b in codes], a_scale, scales, bias, dtype)
    expected = [plain_product(a, *operands) for operands in zip(codes, [a_scale] * 3, scales, bias, strict=True)]
    assert_equal(out.cpu(), torch.cat(expected, dim=-1).to(dtype))


@pytest.mark.parametrize("rows", [(1,), (4,), (2, 9)])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("with_bias", [True, False])
def test_of_values_equals_one_product_after_the_other(
    backend: str, device: str, rows: tuple[int, ...], layout: str, with_bias: bool
) -> None:
    codes, scales, bias = _weights(device)
    weights = [prepare_weight(pack_int4(b), layout) for b in codes]
    a = make_inputs(*rows, 256, device=device)
    out = scaled_mm_cat(a, weights, None, scales, bias if with_bias else (), b_layout=layout)
    alone = [
        scaled_mm(a, weight, None, scale, vector if with_bias else None, b_layout=layout)
        for weight, scale, vector in zip(weights, scales, bias, strict=True)
    ]
    assert_equal(out, torch.cat(alone, dim=-1))


def test_a_weight_without_rows_and_an_input_without_any(backend: str, device: str) -> None:
    codes, scales, _ = _weights(device)
    weights, scales = [codes[0], codes[1][:0], codes[2]], [scales[0], scales[1][:0], scales[2]]
    a = make_inputs(3, 256, device=device)
    expected = torch.cat([scaled_mm(a, weights[i], None, scales[i]) for i in (0, 2)], dim=-1)
    assert_equal(scaled_mm_cat(a, weights, None, scales), expected)
    assert scaled_mm_cat(a[:0], weights, None, scales).shape == (0, 128)


def test_a_bias_that_requires_grad_in_a_list_is_refused(device: str) -> None:
    codes, scales, bias = _weights(device)
    bias[1].requires_grad_()
    with pytest.raises(ValueError, match=r"scaled_mm_cat: bias\[1\] must not require grad"):
        scaled_mm_cat(make_inputs(1, 256, device=device), codes, None, scales, bias)
    with torch.no_grad():
        assert scaled_mm_cat(make_inputs(1, 256, device=device), codes, None, scales, bias).shape == (1, sum(WIDTHS))
