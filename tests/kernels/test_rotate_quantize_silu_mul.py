from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convrot_kernels import rotate_quantize, rotate_quantize_silu_mul
from convrot_kernels.testing import assert_codes_close, assert_equal, make_inputs

OP = "rotate_quantize_silu_mul"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(256,), (0, 256), (17, 3072), (2, 3, 512)])
def test_equals_silu_mul_rounded_once_then_rotate_quantize(
    backend: str, device: str, dtype: torch.dtype, shape: tuple[int, ...], packed: bool
) -> None:
    x, y = make_inputs(*shape, dtype=dtype, device=device), make_inputs(*shape, dtype=dtype, device=device, seed=1)
    rounded = (torch.nn.functional.silu(x.float()) * y.float()).to(dtype)
    actual = rotate_quantize_silu_mul(x, y, 256, 4, packed=packed, clip=0.9)
    assert_codes_close(actual, rotate_quantize(rounded, 256, 4, packed=packed, clip=0.9))


@pytest.mark.parametrize("bits", [4, 8])
def test_is_silu_of_x_times_y(
    backend: str, device: str, bits: int, dense_rotation: Callable[[Tensor, int], Tensor]
) -> None:
    x, y = (make_inputs(8, 512, dtype=torch.float32, device=device, seed=seed) for seed in (0, 1))
    codes, scale = rotate_quantize_silu_mul(x, y, 64, bits)
    exact = x.cpu().double() / (1 + torch.exp(-x.cpu().double())) * y.cpu()
    error = (codes.cpu() * scale.cpu()[:, None] - dense_rotation(exact, 64)).abs()
    assert (error <= 0.501 * scale.cpu()[:, None]).all()


def test_extremes_stay_finite_and_broken_rows_alone(backend: str, device: str, dtype: torch.dtype) -> None:
    x, y = (make_inputs(5, 256, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    expected_codes, expected_scale = rotate_quantize_silu_mul(x, y)
    x[0, 9], y[0, 9] = torch.finfo(dtype).max, 0.5
    x[1, 9], y[1, 9] = torch.finfo(dtype).min, 1.0
    x[2, 9], y[3, 9] = float("nan"), float("inf")
    codes, scale = rotate_quantize_silu_mul(x, y)
    assert scale[:2].isfinite().all()
    assert scale[2:4].isnan().all()
    assert not codes[2:4].any()
    assert (codes[0].abs() == 7).all()  # one spike spreads evenly
    assert_equal(codes[4], expected_codes[4])
    assert_equal(scale[4], expected_scale[4])


def test_non_contiguous_inputs(backend: str, device: str) -> None:
    both = make_inputs(8, 512, device=device)  # gate and value as a fused projection gives them
    x, y = both.chunk(2, dim=-1)
    assert_codes_close(rotate_quantize_silu_mul(x, y), rotate_quantize_silu_mul(x.contiguous(), y.contiguous()))
