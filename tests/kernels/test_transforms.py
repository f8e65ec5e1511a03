import pytest
import torch
from torch import Tensor

from convrot_kernels import rotate, transforms
from convrot_kernels.testing import assert_equal, make_inputs

MATRICES = [
    transforms.identity(96),
    transforms.regular(256),
    transforms.sylvester(512),
    transforms.sylvester(256, signs=3),
    transforms.random_orthogonal(200, seed=1),
    *(transforms.global_hadamard(n) for n in (1, 2, 12, 20, 28, 36, 44, 60, 512, 960, 2560, 3072)),
]


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda matrix: str(len(matrix)))
def test_matrices_are_orthogonal(matrix: Tensor) -> None:
    product = matrix.double() @ matrix.double().t()
    torch.testing.assert_close(product, torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=5e-7)


@pytest.mark.parametrize("n", [4, 12, 20, 28, 36, 44, 60, 512, 960, 1536])
def test_global_hadamard_has_entries_of_one_size(n: int) -> None:
    matrix = transforms.global_hadamard(n, torch.float64) * n**0.5
    torch.testing.assert_close(matrix.abs(), torch.ones(n, n, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("n", "order"),
    [(2048, 1), (512, 1), (3072, 12), (12288, 12), (15360, 60), (2560, 20), (9216, 36), (3584, 28), (5632, 44)],
)
def test_global_order_of_real_widths(n: int, order: int) -> None:
    assert transforms.global_order(n) == (order, n // order)


@pytest.mark.parametrize("n", [0, -8, 3, 6, 7, 184, 46])
def test_widths_without_a_construction_are_refused(n: int) -> None:
    message = rf"global_hadamard: n must be 2\^a \* m .*, got {n}; use a power of 2 times 1, 12, 20, 28, 36, 44 or 60"
    with pytest.raises(ValueError, match=message):
        transforms.global_hadamard(n)


@pytest.mark.parametrize("n", [0, -2, 12, 100])
def test_sylvester_needs_a_power_of_two(n: int) -> None:
    with pytest.raises(ValueError, match=rf"sylvester: n must be a power of 2, got {n}; use 256"):
        transforms.sylvester(n)


def test_a_constant_tells_sylvester_from_regular() -> None:
    ones = torch.ones(256)
    assert_equal(ones @ transforms.regular(256), ones)
    assert_equal(ones @ transforms.sylvester(256), 16 * torch.eye(256)[0])
    assert (ones @ transforms.sylvester(256, signs=0)).abs().max() < 8


def test_signs_and_seeds_are_reproducible_and_different() -> None:
    assert_equal(transforms.sylvester(64, signs=5), transforms.sylvester(64, signs=5))
    assert not torch.equal(transforms.sylvester(64, signs=5), transforms.sylvester(64, signs=6))
    assert_equal(transforms.random_orthogonal(64, 5), transforms.random_orthogonal(64, 5))
    assert not torch.equal(transforms.random_orthogonal(64, 5), transforms.random_orthogonal(64, 6))
    assert_equal(transforms.sylvester(64, signs=5).abs(), transforms.sylvester(64).abs())


def test_apply_blockwise_with_regular_is_rotate() -> None:
    x = make_inputs(2, 3, 768, dtype=torch.float32)
    actual = transforms.apply_blockwise(x, transforms.regular(64, torch.float64))
    assert actual.dtype == torch.float64
    assert_equal(actual.float(), rotate(x, 64))


@pytest.mark.parametrize("matrix", [matrix for matrix in MATRICES if 3072 % len(matrix) == 0], ids=lambda m: len(m))
def test_blockwise_rotation_of_both_sides_keeps_the_product(matrix: Tensor) -> None:
    x, weight = make_inputs(3, 3072, dtype=torch.float64), make_inputs(5, 3072, dtype=torch.float64, seed=1)
    matrix = matrix.double()
    product = transforms.apply_blockwise(x, matrix) @ transforms.apply_blockwise(weight, matrix).t()
    torch.testing.assert_close(product, x @ weight.t(), rtol=1e-4, atol=1e-2)


def test_apply_blockwise_refuses_a_width_that_does_not_fit() -> None:
    message = "apply_blockwise: K must be a multiple of the matrix size, got K=100, n=64; use another n"
    with pytest.raises(ValueError, match=message):
        transforms.apply_blockwise(torch.ones(2, 100), transforms.identity(64))
