from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convrot_kernels import rotate_quantize, rotate_quantize_modulate
from convrot_kernels.testing import assert_codes_close, assert_equal, make_inputs

OP = "rotate_quantize_modulate"


def _modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """(B, ..., K), (B, K) or (K,) -> fp64 (B, ..., K)."""
    x, scale, shift = x.cpu().double(), scale.cpu().double(), shift.cpu().double()
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    if scale.dim() == 2:
        scale, shift = (vector.view(len(x), *[1] * (x.dim() - 2), -1) for vector in (scale, shift))
    return normal * (1 + scale) + shift


SHAPES = [
    ((512,), (512,)),
    ((7, 512), (512,)),
    ((7, 512), (7, 512)),
    ((2, 9, 3072), (2, 3072)),
    ((2, 3, 5, 512), (2, 512)),
    ((2, 3, 5, 512), (512,)),
    ((0, 512), (512,)),
    ((2, 0, 512), (2, 512)),
]


@pytest.mark.parametrize(("shape", "vector"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_is_layer_norm_times_gain_plus_shift(
    backend: str,
    device: str,
    shape: tuple[int, ...],
    vector: tuple[int, ...],
    bits: int,
    dense_rotation: Callable[[Tensor, int], Tensor],
) -> None:
    x = make_inputs(*shape, dtype=torch.float32, device=device) * 3 + 1
    scale, shift = torch.randn(2, *vector, device=device)
    codes, row_scale = rotate_quantize_modulate(x, scale, shift, 1e-3, 64, bits)
    exact = dense_rotation(_modulated(x, scale, shift, 1e-3), 64)
    error = (codes.cpu() * row_scale.cpu()[..., None] - exact).abs()
    assert codes.shape == shape
    assert (error <= 0.502 * row_scale.cpu()[..., None]).all()


@pytest.mark.parametrize("packed", [False, True])
def test_result_is_rounded_once_to_the_input_dtype(backend: str, device: str, dtype: torch.dtype, packed: bool) -> None:
    x = make_inputs(2, 17, 1024, dtype=dtype, device=device)
    scale, shift = torch.randn(2, 2, 1024, device=device, dtype=dtype)
    normal = torch.nn.functional.layer_norm(x.float(), (1024,), eps=1e-6)
    rounded = (normal * (1 + scale.float())[:, None] + shift.float()[:, None]).to(dtype)
    codes, row_scale = rotate_quantize_modulate(x, scale, shift, packed=packed)
    expected, expected_scale = rotate_quantize(rounded, packed=packed)
    # another order of the sums may move a value over a 16-bit rounding boundary: rarely, and by little
    assert (codes != expected).float().mean() < 2e-3
    torch.testing.assert_close(row_scale, expected_scale, rtol=2e-3, atol=0)


def test_vectors_may_have_another_dtype(backend: str, device: str) -> None:
    x = make_inputs(2, 5, 256, dtype=torch.bfloat16, device=device)
    scale, shift = torch.randn(2, 2, 256, device=device).bfloat16()
    expected = rotate_quantize_modulate(x, scale.float(), shift.float())
    assert_codes_close(rotate_quantize_modulate(x, scale, shift), expected)


def test_constant_rows_give_the_shift(backend: str, device: str) -> None:
    x = torch.full((3, 256), 2.5, device=device)
    scale, shift = torch.randn(2, 256, device=device)
    assert_codes_close(rotate_quantize_modulate(x, scale, shift), rotate_quantize(shift.expand(3, 256)))


@pytest.mark.parametrize("sign", [1, -1])
def test_one_huge_entry_is_normalized_like_any_other(backend: str, device: str, dtype: torch.dtype, sign: int) -> None:
    x = torch.zeros(2, 512, dtype=dtype, device=device)
    x[0, 7] = sign * torch.finfo(dtype).max
    x[1, 7] = sign * 1000
    zero = torch.zeros(512, device=device)
    codes, scale = rotate_quantize_modulate(x, zero, zero)
    assert scale.isfinite().all()
    assert_equal(codes[0], codes[1])
    torch.testing.assert_close(scale[0], scale[1], rtol=1e-2, atol=0)


def test_rows_of_the_largest_value_stay_finite(backend: str, device: str, dtype: torch.dtype) -> None:
    x = torch.full((2, 512), torch.finfo(dtype).max, dtype=dtype, device=device)
    zero = torch.zeros(512, device=device)
    assert rotate_quantize_modulate(x, zero, zero)[1].isfinite().all()


def test_broken_rows_touch_no_other_row(backend: str, device: str, dtype: torch.dtype) -> None:
    x = make_inputs(4, 256, dtype=dtype, device=device)
    scale, shift = torch.randn(2, 256, device=device)
    expected_codes, expected_scale = rotate_quantize_modulate(x, scale, shift)
    x[0, 9], x[2, 9] = float("nan"), -float("inf")
    expected_codes[[0, 2]], expected_scale[[0, 2]] = 0, float("nan")
    codes, row_scale = rotate_quantize_modulate(x, scale, shift)
    assert_equal(codes, expected_codes)
    assert_equal(row_scale, expected_scale)


def test_non_contiguous_inputs(backend: str, device: str) -> None:
    x = make_inputs(3, 512, 4, device=device).transpose(1, 2)
    shift, scale, _ = torch.randn(3, 3 * 512, device=device).chunk(3, dim=-1)
    expected = rotate_quantize_modulate(x.contiguous(), scale.contiguous(), shift.contiguous())
    assert_codes_close(rotate_quantize_modulate(x, scale, shift), expected)
