"""The comparators must fail where they should, or every test that uses them proves nothing."""

import pytest
import torch

from convrot_kernels import testing
from convrot_kernels.testing import assert_codes_close, assert_equal, make_codes, make_inputs, make_scale, time_median


def test_assert_equal_accepts_nan_and_names_the_first_difference() -> None:
    expected = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
    assert_equal(expected.clone(), expected)
    other = expected.clone()
    other[1, 0] = 5
    with pytest.raises(AssertionError, match=r"1 of 4 elements differ; first at \(1, 0\): 5.0 instead of 3.0"):
        assert_equal(other, expected)
    other[0, 1] = 0
    with pytest.raises(AssertionError, match=r"2 of 4 elements differ; first at \(0, 1\): 0.0 instead of nan"):
        assert_equal(other, expected)
    with pytest.raises(AssertionError, match=r"shape \(4,\), expected \(2, 2\)"):
        assert_equal(expected.flatten(), expected)
    with pytest.raises(AssertionError, match=r"dtype torch.float64, expected torch.float32"):
        assert_equal(expected.double(), expected)


def test_assert_codes_close_allows_one_step_in_a_hundred_thousand() -> None:
    codes, scale = make_codes(200, 1024).clamp(-6, 6), make_scale(200)
    other = codes.clone()
    other[3, 4] += 1
    other[9, 9] -= 1
    assert_codes_close((other, scale * (1 + 5e-6)), (codes, scale))
    other[1, 1] += 1
    with pytest.raises(AssertionError, match="3 of 204800 codes differ, allowed are 1e-05 of them"):
        assert_codes_close((other, scale), (codes, scale))
    other[1, 1] += 1
    with pytest.raises(AssertionError, match="3 of 204800 codes differ, one by 2 steps"):
        assert_codes_close((other, scale), (codes, scale))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_codes_close((codes, scale * (1 + 1e-4)), (codes, scale))


def test_assert_codes_close_compares_packed_codes_as_codes() -> None:
    expected, scale = torch.zeros(2, 4, dtype=torch.uint8), make_scale(2)
    one_step = torch.full((2, 4), 0x10, dtype=torch.uint8)  # 16 as bytes, but one step as codes
    with pytest.raises(AssertionError, match="8 of 16 codes differ, allowed"):
        assert_codes_close((one_step, scale), (expected, scale))


def test_inputs_have_outliers_and_follow_their_seed() -> None:
    x = make_inputs(64, 512, dtype=torch.float32)
    assert_equal(x, make_inputs(64, 512, dtype=torch.float32))
    assert not torch.equal(x, make_inputs(64, 512, dtype=torch.float32, seed=1))
    spread = x.std(0)
    assert int((spread > 10).sum()) == 4
    assert int((x[:, spread < 10].mean(1) > 5).sum()) == 4
    assert int(make_codes(1000).abs().max()) == 7
    assert int(make_codes(9000, bits=8).abs().max()) == 127
    assert 1e-3 <= make_scale(1000).min() < make_scale(1000).max() <= 0.1


def test_time_median_rotates_the_arguments(device: str) -> None:
    seen: list[int] = []
    sets = [(torch.ones(4, device=device), index) for index in range(3)]
    seconds = time_median(lambda tensor, index: seen.append(index) or tensor + 1, sets, repeats=6, warmup=2)
    assert 0 < seconds < 1
    assert seen == [0, 1, 0, 1, 2, 0, 1, 2]


def test_counts() -> None:
    assert testing.gemm_operations(2, 3, 5) == 60
    assert testing.gemm_bytes(2, 4, 8) == 8 + 16 + 16 + 8 + 16 + 8
    assert testing.gemm_bytes(2, 4, 8, a_bits=16) == 32 + 16 + 16 + 16 + 8
    assert testing.rotate_quantize_bytes(2, 8) == 32 + 16 + 8
    assert testing.rotate_quantize_bytes(2, 8, code_bits=4, inputs=2) == 64 + 8 + 8
