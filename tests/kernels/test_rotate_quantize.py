import hashlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convrot_kernels import hadamard, pack_int4, reference, rotate, rotate_quantize
from convrot_kernels.testing import assert_codes_close, assert_equal, make_inputs

OP = "rotate_quantize"
GOLDEN_CODES = "c87b90d509532acec7d4d1d8adb9642c34f462d6560d0f133b0c2eda94a5106c"
GOLDEN_SCALE = "05af679fd4a5600d3d68b64bd2c388afc04230fdcc35ae3676ee882c271b475c"


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def test_golden_codes_of_the_file_format(backend: str, device: str) -> None:
    index = torch.arange(8 * 256, dtype=torch.int64)
    weight = ((index * 2654435761) % 65536).double() / 65536 - 0.5
    packed, scale = rotate_quantize(weight.float().view(8, 256).to(device), packed=True)
    assert _bytes(packed[0, :16]).hex() == "0221ff0feeff13f4f31210301f2f4c1d"
    assert _bytes(scale[:4]).hex() == "49a2063e0028ec3d6e4bda3ddbeefe3d"
    assert hashlib.sha256(_bytes(packed)).hexdigest() == GOLDEN_CODES
    assert hashlib.sha256(_bytes(scale)).hexdigest() == GOLDEN_SCALE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group_size", "k"), [(16, 48), (64, 1152), (256, 3072), (1024, 15360)])
def test_codes_equal_the_plain_quantizer(
    backend: str,
    device: str,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    k: int,
    plain_quantizer: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    x = make_inputs(33, k, dtype=dtype, device=device)
    assert_codes_close(rotate_quantize(x, group_size, bits), plain_quantizer(x, group_size, bits))


@pytest.mark.parametrize("clip", [1e-30, 0.3, 0.75])
@pytest.mark.parametrize("bits", [4, 8])
def test_clip_shrinks_the_scale_and_saturates_codes(
    backend: str, device: str, clip: float, bits: int, plain_quantizer: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    x = make_inputs(16, 512, device=device)
    codes, scale = rotate_quantize(x, 256, bits, clip=clip)
    assert_codes_close((codes, scale), plain_quantizer(x, 256, bits, clip))
    assert int((codes.abs() == 2 ** (bits - 1) - 1).sum()) > 16


def test_packed_holds_the_same_codes(backend: str, device: str, dtype: torch.dtype) -> None:
    x = make_inputs(2, 9, 512, dtype=dtype, device=device)
    codes, scale = rotate_quantize(x)
    packed, packed_scale = rotate_quantize(x, packed=True)
    assert_equal(packed, pack_int4(codes))
    assert_equal(packed_scale, scale)


def test_ties_round_to_even(backend: str, device: str) -> None:
    halves = torch.arange(-14, 15).float().repeat(18)[:512] / 2  # largest entry 7: the scale is exactly 1
    x = reference.rotate(halves)
    assert_equal(reference.rotate(x), halves)
    codes, scale = rotate_quantize(x.to(device))
    assert scale.item() == 1.0
    assert_equal(codes.cpu(), halves.round().to(torch.int8))
    assert codes[[1, 3, 5]].tolist() == [-6, -6, -4]


def test_scale_is_divided_by_not_multiplied_with_a_reciprocal(backend: str, device: str) -> None:
    row = torch.zeros(1, 256, device=device)
    row[0, 0] = 1.1
    assert rotate_quantize(row)[1].item() == (torch.tensor(1.1) / 16 / 7).item()


def test_reference_divides_where_a_reciprocal_would_miss_ties() -> None:
    halves = (torch.arange(-14, 15) / 2).repeat(18)[:512]
    codes, scale = reference.rotate_quantize(63 * rotate(halves))
    assert scale.item() == 63
    assert_equal(codes, halves.round().to(torch.int8))
    assert not torch.equal((63 * halves * (1 / scale)).round(), halves.round())


def test_another_scale_rule_is_one_line_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rms = lambda rotated, qmax: 2 * rotated.square().mean(-1).sqrt()  # noqa: E731
    monkeypatch.setitem(reference.SCALE_RULES, "rms", rms)
    x = make_inputs(8, 256, dtype=torch.float32)
    x[2, 5] = float("inf")
    codes, scale = rotate_quantize(x, rule="rms", clip=0.5)
    assert_equal(scale.isnan(), torch.arange(8) == 2)
    torch.testing.assert_close(scale[:2], x[:2].square().mean(-1).sqrt() / 7)
    assert not codes[2].any()
    assert int(codes.max()) == 7


def test_zero_rows_have_zero_codes_and_the_least_scale(backend: str, device: str, dtype: torch.dtype) -> None:
    x = make_inputs(4, 256, dtype=dtype, device=device)
    x[[0, 2]] = 0
    codes, scale = rotate_quantize(x)
    assert not codes[[0, 2]].any()
    assert_equal(scale[[0, 2]].cpu(), torch.full((2,), 1e-10))
    assert_codes_close((codes[1], scale[1]), rotate_quantize(x[1]))


def test_scale_has_a_floor(backend: str, device: str) -> None:
    tiny = 3.2e-10 * hadamard(256, device=device)[:1] * 16
    codes, scale = rotate_quantize(tiny / 16)
    assert scale.item() == pytest.approx(1e-10)
    assert codes[0].tolist() == [3] + [0] * 255


@pytest.mark.parametrize("sign", [1, -1])
def test_one_huge_entry_stays_finite(backend: str, device: str, dtype: torch.dtype, sign: int) -> None:
    largest = sign * torch.finfo(dtype).max
    x = make_inputs(3, 512, dtype=dtype, device=device)
    x[0, 17], x[1, :] = largest, largest
    codes, scale = rotate_quantize(x)
    assert scale.isfinite().all()
    assert_equal(codes[0, :256].abs(), torch.full((256,), 7, dtype=torch.int8, device=device))
    assert not codes[0, 256:].any()
    assert_equal(codes[1], torch.full((512,), 7 * sign, dtype=torch.int8, device=device))
    assert_codes_close((codes[2], scale[2]), rotate_quantize(x[2]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_with_nan_or_inf_touch_no_other_row(
    backend: str, device: str, dtype: torch.dtype, value: float, packed: bool
) -> None:
    x = make_inputs(2, 8, 512, dtype=dtype, device=device)
    codes, scale = rotate_quantize(x, packed=packed)
    x[0, 3, 300] = x[1, 7, 0] = value
    codes[0, 3], codes[1, 7], scale[0, 3], scale[1, 7] = 0, 0, float("nan"), float("nan")
    broken_codes, broken_scale = rotate_quantize(x, packed=packed)
    assert_equal(broken_codes, codes)
    assert_equal(broken_scale, scale)


def test_rows_whose_rotation_leaves_fp32_follow_the_row_rule(backend: str, device: str) -> None:
    x = make_inputs(4, 256, dtype=torch.float32, device=device)
    codes, scale = rotate_quantize(x)
    x[2] = 3e38 * hadamard(256, device=device)[9].sign()  # rotates to one entry of 4.8e39
    codes[2], scale[2] = 0, float("nan")
    broken_codes, broken_scale = rotate_quantize(x)
    assert_equal(broken_codes, codes)
    assert_equal(broken_scale, scale)


@pytest.mark.parametrize("rows", [(), (1,), (0,), (3, 0, 2), (2, 3), (17,), (1, 2, 1, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_leading_dimensions_of_any_rank(backend: str, device: str, rows: tuple[int, ...], packed: bool) -> None:
    x = make_inputs(*rows, 512, device=device)
    codes, scale = rotate_quantize(x, packed=packed)
    assert codes.shape == (*rows, 256 if packed else 512)
    assert scale.shape == rows
    flat_codes, flat_scale = rotate_quantize(x.reshape(-1, 512), packed=packed)
    assert_equal(codes.reshape(flat_codes.shape), flat_codes)
    assert_equal(scale.reshape(-1), flat_scale)


def test_non_contiguous_inputs(backend: str, device: str, dtype: torch.dtype) -> None:
    x, tall = make_inputs(24, 512, dtype=dtype, device=device), make_inputs(256, 24, dtype=dtype, device=device)
    last = x.unflatten(0, (4, 6)).transpose(0, 1)
    for view in (tall.t(), x[::5], x[:, ::2], x[:, 7:263], x[:1].expand(7, 512), last):
        codes, scale = rotate_quantize(view)
        expected_codes, expected_scale = rotate_quantize(view.contiguous())
        assert_equal(codes, expected_codes)
        assert_equal(scale, expected_scale)


def test_fp16_and_bf16_are_rotated_in_fp32(backend: str, device: str) -> None:
    x = make_inputs(64, 1024, dtype=torch.bfloat16, device=device)
    exact = rotate_quantize(x)
    assert_codes_close(exact, rotate_quantize(x.float()))
    rounded_between = (reference.rotate(x).float() / exact[1][:, None]).round()
    assert (rounded_between != exact[0]).sum() > 20


@given(
    rows=st.integers(1, 6),
    group_size=st.sampled_from([16, 64, 256, 1024]),
    bits=st.sampled_from([4, 8]),
    exponent=st.integers(-20, 60),
    seed=st.integers(0, 2**31),
)
def test_codes_are_within_half_a_step(rows: int, group_size: int, bits: int, exponent: int, seed: int) -> None:
    x = make_inputs(rows, 2048, dtype=torch.float32, seed=seed) * 2.0**exponent
    codes, scale = rotate_quantize(x, group_size, bits)
    qmax = 2 ** (bits - 1) - 1
    assert_equal(codes.abs().amax(-1), torch.full((rows,), qmax, dtype=torch.int8))
    error = (codes * scale[:, None] - rotate(x, group_size)).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
