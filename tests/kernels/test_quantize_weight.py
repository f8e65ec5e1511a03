"""quantize_weight: scale rules for weights, against a brute force over every scale at which a code changes."""

import pytest
import torch
from torch import Tensor

from convrot_kernels import quantize_weight, rotate_quantize, unpack_int4
from convrot_kernels.reference import rotate
from convrot_kernels.testing import assert_codes_close, assert_equal
from convrot_kernels.weights import mse_scale

N = 12
OP = "rotate_quantize"  # whose backends the fixture offers


def rows(kind: str, k: int) -> Tensor:
    gaussian = torch.randn(N, k)
    return {
        "gaussian": gaussian,
        "heavy": gaussian * torch.randn(N, k).exp(),
        "spike": torch.cat((gaussian[:, 1:], torch.full((N, 1), 40.0)), dim=1),
        "two_values": gaussian.sign() * (1 + (gaussian > 1)),
    }[kind]


def least_error(row: Tensor, qmax: int = 7) -> float:
    """Between two neighbouring scales at which a code changes, the codes are fixed and the best error is a formula."""
    row = row.abs().double()
    changes = torch.cat([row / (j - 0.5) for j in range(1, qmax + 1)]).unique()
    between = torch.cat((changes, (changes[1:] + changes[:-1]) / 2, changes[-1:] * 2))
    codes = (row / between[between > 0, None]).round().clamp(max=qmax)
    best = (codes @ row) / codes.square().sum(1).clamp_min(1e-30)
    return float((row - best[:, None] * codes).square().sum(1).min())


def error(row: Tensor, scale: Tensor) -> float:
    codes = (row / scale).round().clamp(-7, 7)
    return float((row.double() - scale.double() * codes.double()).square().sum())


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "spike", "two_values"])
@pytest.mark.parametrize("k", [256, 768])
def test_mse_finds_the_least_error_of_every_row(kind: str, k: int, device: str) -> None:
    values = rows(kind, k)
    found = mse_scale(values.to(device), 7).cpu()
    for row, scale in zip(values, found, strict=True):
        least = least_error(row)
        assert error(row, scale) <= least * (1 + 1e-4) + 1e-9 * float(row.square().sum())


def test_mse_lowers_the_error_of_long_gaussian_rows_by_a_quarter(device: str) -> None:
    weight = torch.randn(N, 3072, device=device)
    rotated = rotate(weight)
    errors = {}
    for rule in ("absmax", "mse"):
        codes, scale = quantize_weight(weight, rule=rule)
        errors[rule] = float((rotated - codes * scale[:, None]).norm() / rotated.norm())
    assert errors["mse"] < 0.75 * errors["absmax"]
    assert errors["mse"] < 0.12  # a 15-level uniform quantizer of a Gaussian: .1140 at best (Max 1960: 16 levels .1075)


@pytest.mark.parametrize("bits", [4, 8])
def test_balanced_rounding_keeps_the_sum_of_every_group_for_little_error(device: str, bits: int) -> None:
    weight = torch.randn(N, 1024, device=device)
    rotated, errors, sums = rotate(weight), {}, {}
    for rounding in ("nearest", "balanced"):
        codes, scale = quantize_weight(weight, bits=bits, rounding=rounding)
        left = codes - rotated / scale[:, None]
        assert left.abs().max() <= (0.5 if rounding == "nearest" else 1.0) + 1e-3
        errors[rounding], sums[rounding] = float(left.norm()), float(left.unflatten(-1, (-1, 256)).sum(-1).abs().max())
    assert sums["nearest"] > 4  # the largest of 48 sums of 256 errors
    assert sums["balanced"] <= 0.5 + 1e-3
    assert errors["balanced"] < 1.03 * errors["nearest"]


def test_balanced_rounding_lets_a_token_s_mean_pass(device: str) -> None:
    weight, x = torch.randn(64, 1024, device=device), 1 + 0.01 * torch.randn(8, 1024, device=device)
    expected, errors = x @ weight.t(), {}
    for rounding in ("nearest", "balanced"):
        codes, scale = quantize_weight(weight, rule="mse", rounding=rounding)
        out = rotate(x) @ (codes * scale[:, None]).t()
        errors[rounding] = float((out - expected).norm() / expected.norm())
    assert errors["balanced"] < 0.1 * errors["nearest"]


def test_balanced_rounding_moves_no_code_beyond_the_last(device: str) -> None:
    weight = torch.randn(N, 256, device=device)
    weight[:, ::2] = rotate(torch.full((N, 256), 3.0, device=device))[:, ::2]  # clipped on one side by the mse scale
    for rule in ("absmax", "mse"):
        codes, _ = quantize_weight(weight, rule=rule, rounding="balanced")
        assert codes.abs().max() <= 7


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_balanced_rounding_of_a_group_that_is_clipped_as_a_whole(device: str, spread: float) -> None:
    """60 groups, for which one of large values, all of one sign, is not worth a coarser scale."""
    rotated = torch.randn(N, 15360, device=device)
    rotated[:, :256] = 3 + spread * torch.randn(N, 256, device=device)
    codes, scale = quantize_weight(rotate(rotated), rule="mse", rounding="balanced")
    assert (rotated[:, :256] / scale[:, None]).mean() > 7
    assert codes.abs().max() == 7
    nearest = quantize_weight(rotate(rotated), rule="mse")[0]
    assert (codes - nearest).abs().max() == 1


def test_absmax_is_rotate_quantize(backend: str, device: str) -> None:
    weight = torch.randn(48, 512, dtype=torch.bfloat16, device=device)
    for got, expected in zip(quantize_weight(weight, packed=True), rotate_quantize(weight, packed=True), strict=True):
        assert_equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mse_codes_are_the_rounded_rotation_in_blocks_of_rows(
    backend: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(50, 512, dtype=dtype, device=device)
    packed, scale = quantize_weight(weight, packed=True, rule="mse")
    assert packed.dtype == torch.uint8
    rotated = rotate(weight.float())
    expected = (rotated / scale[:, None]).round().clamp(-7, 7).to(torch.int8)
    assert_codes_close((unpack_int4(packed), scale), (expected, scale))
    monkeypatch.setattr("convrot_kernels.weights._BLOCK", 512 * 7)
    again, same = quantize_weight(weight, rule="mse")
    assert_equal(again, unpack_int4(packed))
    assert_equal(same, scale)


def test_mse_of_rows_of_zeros_and_rows_that_are_not_finite(device: str) -> None:
    weight = torch.randn(4, 256, device=device)
    weight[1], weight[2, 7], weight[3, 9] = 0.0, float("nan"), float("inf")
    codes, scale = quantize_weight(weight, rule="mse", rounding="balanced")
    assert scale.isfinite().tolist() == [True, True, False, False]
    assert scale[1] == torch.tensor(1e-10)
    assert not codes[1:].any()
    assert_equal(codes[:1], quantize_weight(weight[:1], rule="mse", rounding="balanced")[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "rule must be one of absmax, mse, got 'best'"),
        ({"rule": "mse", "bits": 8}, 'rule="mse" needs bits=4, got bits=8; use rule="absmax"'),
        ({"rounding": "up"}, "rounding must be one of nearest, balanced, got 'up'; use rounding=\"nearest\""),
        ({"bits": 5}, "bits must be 4 or 8"),
        ({"group_size": 1024}, "K must be a multiple of group_size, got K=512, group_size=1024; use group_size=256"),
    ],
)
def test_refuses_what_it_cannot_do(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^quantize_weight: {message}"):
        quantize_weight(torch.randn(16, 512), **options)


def test_refuses_a_weight_that_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="weight must be a matrix, got 3 dimensions; pass a weight"):
        quantize_weight(torch.randn(2, 16, 512))
