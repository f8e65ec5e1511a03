from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convrot_kernels import rotate_quantize, rotate_quantize_gelu
from convrot_kernels.testing import assert_codes_close, assert_equal, make_inputs

OP = "rotate_quantize_gelu"


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(256,), (0, 256), (17, 3072), (2, 3, 512)])
def test_equals_gelu_rounded_once_then_rotate_quantize(
    backend: str, device: str, dtype: torch.dtype, shape: tuple[int, ...], packed: bool
) -> None:
    x = make_inputs(*shape, dtype=dtype, device=device)
    rounded = torch.nn.functional.gelu(x.float(), approximate="tanh").to(dtype)
    actual = rotate_quantize_gelu(x, 256, 4, packed=packed, clip=0.9)
    assert_codes_close(actual, rotate_quantize(rounded, 256, 4, packed=packed, clip=0.9))


@pytest.mark.parametrize("bits", [4, 8])
def test_is_the_tanh_gelu(
    backend: str, device: str, bits: int, dense_rotation: Callable[[Tensor, int], Tensor]
) -> None:
    x = make_inputs(8, 512, dtype=torch.float32, device=device)
    codes, scale = rotate_quantize_gelu(x, 64, bits)
    exact = dense_rotation(_gelu(x.cpu().double()), 64)
    assert ((codes.cpu() * scale.cpu()[:, None] - exact).abs() <= 0.501 * scale.cpu()[:, None]).all()


def test_extremes_stay_finite_and_broken_rows_alone(backend: str, device: str, dtype: torch.dtype) -> None:
    x = make_inputs(5, 256, dtype=dtype, device=device)
    expected_codes, expected_scale = rotate_quantize_gelu(x)
    x[0, 9], x[1, 9] = torch.finfo(dtype).max, torch.finfo(dtype).min
    x[2, 9], x[3, 9] = float("nan"), float("inf")
    codes, scale = rotate_quantize_gelu(x)
    assert scale[:2].isfinite().all()
    assert scale[2:4].isnan().all()
    assert not codes[2:4].any()
    assert (codes[0].abs() == 7).all()  # one spike spreads evenly
    assert_equal(codes[4], expected_codes[4])
    assert_equal(scale[4], expected_scale[4])


def test_non_contiguous_input(backend: str, device: str) -> None:
    x = make_inputs(256, 8, device=device).t()
    assert_codes_close(rotate_quantize_gelu(x), rotate_quantize_gelu(x.contiguous()))
