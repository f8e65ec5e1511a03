from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convrot_kernels import rotate_quantize, rotate_quantize_cat_gelu, rotate_quantize_gelu
from convrot_kernels.testing import assert_codes_close, assert_equal, make_inputs

OP = "rotate_quantize_cat_gelu"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("rows", "k_x", "k_y"), [((), 256, 512), ((0,), 256, 256), ((17,), 3072, 12288), ((2, 3), 512, 256)]
)
def test_equals_cat_and_gelu_rounded_once_then_rotate_quantize(
    backend: str, device: str, dtype: torch.dtype, rows: tuple[int, ...], k_x: int, k_y: int, packed: bool
) -> None:
    x = make_inputs(*rows, k_x, dtype=dtype, device=device)
    y = make_inputs(*rows, k_y, dtype=dtype, device=device, seed=1)
    rounded = torch.nn.functional.gelu(y.float(), approximate="tanh").to(dtype)
    actual = rotate_quantize_cat_gelu(x, y, packed=packed, clip=0.9)
    assert_codes_close(actual, rotate_quantize(torch.cat((x, rounded), -1), packed=packed, clip=0.9))


def test_one_scale_serves_both_halves(
    backend: str, device: str, plain_quantizer: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    x = make_inputs(6, 256, dtype=torch.float32, device=device)
    y = torch.zeros(6, 512, device=device)
    codes, scale = rotate_quantize_cat_gelu(x, y)
    assert_codes_close((codes[:, :256].contiguous(), scale), plain_quantizer(x))
    assert not codes[:, 256:].any()
    codes, scale = rotate_quantize_cat_gelu(torch.zeros_like(x), 9 * y + 3)
    only_y = rotate_quantize_gelu(9 * y + 3)
    assert_codes_close((codes[:, 256:].contiguous(), scale), only_y)


def test_extremes_stay_finite_and_broken_rows_alone(backend: str, device: str, dtype: torch.dtype) -> None:
    x, y = (make_inputs(5, 256, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    expected_codes, expected_scale = rotate_quantize_cat_gelu(x, y)
    x[0, 9], y[1, 9] = torch.finfo(dtype).min, torch.finfo(dtype).max
    x[2, 9], y[3, 9] = float("nan"), float("inf")
    codes, scale = rotate_quantize_cat_gelu(x, y)
    assert scale[:2].isfinite().all()
    assert scale[2:4].isnan().all()
    assert not codes[2:4].any()
    assert (codes[0, :256].abs() == 7).all()  # one spike spreads evenly over its group
    assert_equal(codes[4], expected_codes[4])
    assert_equal(scale[4], expected_scale[4])


def test_non_contiguous_inputs(backend: str, device: str) -> None:
    both = make_inputs(8, 1024, device=device)
    x, y = both.split([256, 768], dim=-1)
    assert_codes_close(rotate_quantize_cat_gelu(x, y), rotate_quantize_cat_gelu(x.contiguous(), y.contiguous()))
