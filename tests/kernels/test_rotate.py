from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convrot_kernels import hadamard, reference, rotate
from convrot_kernels.testing import assert_equal, make_inputs

OP = "rotate"
GROUPS = [16, 64, 256, 1024]


@pytest.mark.parametrize("n", [1, 4, 16, 64, 256, 1024])
def test_hadamard_is_symmetric_orthogonal_and_its_rows_sum_to_one(n: int) -> None:
    matrix = hadamard(n, torch.float64)
    assert_equal(matrix, matrix.t().contiguous())
    assert_equal(matrix @ matrix, torch.eye(n, dtype=torch.float64))
    assert_equal(matrix.sum(1), torch.ones(n, dtype=torch.float64))
    assert_equal(matrix.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", [0, -4, 2, 8, 12, 128, 512])
def test_hadamard_rejects_what_is_no_power_of_4(n: int) -> None:
    with pytest.raises(ValueError, match=rf"hadamard: n must be a power of 4, got {n}; use 4, 16"):
        hadamard(n)


@pytest.mark.parametrize("group_size", GROUPS)
def test_rotate_equals_the_dense_product(
    backend: str, device: str, dtype: torch.dtype, group_size: int, dense_rotation: Callable[..., Tensor]
) -> None:
    x = make_inputs(23, 3072, dtype=dtype, device=device)
    expected = dense_rotation(x, group_size).float()
    actual = rotate(x.float(), group_size).cpu()
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(expected.abs().max()) * 2**-21)
    assert_equal(rotate(x, group_size), rotate(x.float(), group_size).to(dtype))


@pytest.mark.parametrize("group_size", GROUPS)
def test_rotate_is_its_own_inverse(backend: str, device: str, group_size: int) -> None:
    x = make_inputs(5, 2048, dtype=torch.float32, device=device)
    torch.testing.assert_close(rotate(rotate(x, group_size), group_size), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("group_size", GROUPS)
def test_rotate_keeps_constants(backend: str, device: str, dtype: torch.dtype, group_size: int) -> None:
    ones = torch.ones(3, 1024, dtype=dtype, device=device)
    assert_equal(rotate(ones, group_size), ones)
    assert_equal(rotate(-6.5 * ones, group_size), -6.5 * ones)


def test_rotate_keeps_norms(backend: str, device: str) -> None:
    x = make_inputs(64, 512, dtype=torch.float32, device=device)
    torch.testing.assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_a_row_of_h_becomes_one_spike(backend: str, device: str) -> None:
    x = 16 * hadamard(256, device=device)[5]
    assert_equal(rotate(x), 16 * torch.eye(256, device=device)[5])


def test_products_are_invariant_under_rotation(dense_rotation: Callable[..., Tensor]) -> None:
    x, weight = make_inputs(9, 768), make_inputs(12, 768, seed=1)
    product = dense_rotation(x, 256) @ dense_rotation(weight, 256).t()
    torch.testing.assert_close(product, x.double() @ weight.double().t(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (2, 1, 3, 2, 256), (0, 256), (2, 0, 256), (300, 512)])
def test_leading_dimensions_of_any_rank(backend: str, device: str, shape: tuple[int, ...]) -> None:
    x = make_inputs(*shape, dtype=torch.float32, device=device)
    actual = rotate(x)
    assert actual.shape == x.shape
    every = max(1, x.numel() // 8192)  # of the largest, some rows of every block
    for row, expected in zip(actual.reshape(-1, 256)[::every], x.reshape(-1, 256)[::every], strict=True):
        assert_equal(row, rotate(expected))


def test_non_contiguous_inputs(backend: str, device: str) -> None:
    x = make_inputs(24, 512, dtype=torch.float32, device=device)
    for view in (
        make_inputs(256, 24, dtype=torch.float32, device=device).t(),
        x[::3],
        x[:, ::2],
        x[:, 100:356],
        x[:1].expand(7, 512),
        x.unflatten(0, (4, 6)).transpose(0, 1),
    ):
        assert not view.is_contiguous()
        assert_equal(rotate(view), rotate(view.contiguous()))


def test_extreme_finite_values_stay_finite(backend: str, device: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.zeros(2, 512, dtype=dtype, device=device)
    x[0, 3], x[1, 300] = largest, -largest
    assert_equal(rotate(x)[0, :256].abs(), torch.full((256,), largest, dtype=dtype, device=device) / 16)
    constant = torch.full((1, 1024), largest, dtype=dtype, device=device)
    rtol = 0 if backend == "reference" or dtype != torch.float32 else 2.0**-21  # the bound of a backend's fp32 sums
    torch.testing.assert_close(rotate(constant, 1024), constant, rtol=rtol, atol=0)


def test_nan_and_inf_stay_in_their_group(backend: str, device: str) -> None:
    x = make_inputs(3, 768, dtype=torch.float32, device=device)
    broken = x.clone()
    broken[0, 300], broken[2, 5] = float("nan"), float("inf")
    actual, expected = rotate(broken), rotate(x)
    assert not actual[0, 256:512].isfinite().any()
    assert not actual[2, :256].isfinite().any()
    expected[0, 256:512], expected[2, :256] = actual[0, 256:512], actual[2, :256]
    assert_equal(actual, expected)


def test_gradient_is_the_rotation_of_the_gradient(device: str, dtype: torch.dtype) -> None:
    x = make_inputs(2, 3, 128, dtype=dtype, device=device).requires_grad_()
    grad = make_inputs(2, 3, 128, dtype=dtype, device=device, seed=1)
    rotate(x, 64).backward(grad)
    assert x.grad is not None
    assert_equal(x.grad, rotate(grad, 64))


def test_second_derivative_exists() -> None:
    x = make_inputs(4, 64, dtype=torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(rotate(x, 16).pow(3).sum(), x, create_graph=True)
    grad.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, rotate(6 * rotate(x.detach(), 16) * rotate(torch.ones_like(x), 16), 16))


def test_input_is_not_changed(backend: str, device: str) -> None:
    x = make_inputs(4, 256, dtype=torch.float32, device=device)
    before = x.clone()
    assert rotate(x).data_ptr() != x.data_ptr()
    assert_equal(x, before)


@given(
    rows=st.integers(0, 9),
    groups=st.integers(1, 5),
    group_size=st.sampled_from(GROUPS),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 2**31),
)
def test_rotation_is_linear_and_an_involution(
    rows: int, groups: int, group_size: int, exponent: int, seed: int
) -> None:
    x = make_inputs(rows, groups * group_size, dtype=torch.float32, seed=seed)
    scaled = x * 2.0**exponent
    assert_equal(rotate(scaled, group_size), rotate(x, group_size) * 2.0**exponent)
    back = rotate(rotate(scaled, group_size), group_size) * 2.0**-exponent
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)


def test_reference_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    x = make_inputs(700, 1024, dtype=dtype)
    assert_equal(reference.rotate(x)[411:412], reference.rotate(x[411:412]))
