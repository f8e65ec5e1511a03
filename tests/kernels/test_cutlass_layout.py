import pytest
import torch
from torch import Tensor

from convrot_kernels import pack_int4, prepare_weight, restore_weight, scaled_mm, unpack_int4
from convrot_kernels.backends.cutlass.products import BLOCKS
from convrot_kernels.testing import assert_equal, make_codes, make_scale


def _offset(n: Tensor, k: Tensor, columns: int) -> Tensor:
    """Nibble offset of weight (n, k): CUTLASS's layout function, block by block."""
    block = n // 16 * (columns // 32) + k // 32
    row, column = n % 16, k % 32
    return 512 * block + 64 * (row % 8) + row // 8 + 2 * (column % 4) + 16 * (column // 4 % 4) + 8 * (column // 16)


@pytest.mark.parametrize(("n", "k"), [(16, 32), (16, 96), (48, 32), (160, 3072), (3072, 256)])
def test_every_nibble_lies_at_the_offset_of_the_closed_form(n: int, k: int) -> None:
    codes = make_codes(n, k)
    resident = unpack_int4(prepare_weight(pack_int4(codes), BLOCKS)).flatten()
    where = _offset(torch.arange(n)[:, None], torch.arange(k)[None], k)
    assert_equal(where.flatten().sort().values, torch.arange(n * k))  # a permutation
    assert_equal(resident[where], codes)


@pytest.mark.parametrize(
    ("n", "k"), [(16, 32), (32, 64), (3072, 3072), (9216, 128), (17, 64), (16, 48), (0, 64), (16, 0)]
)
def test_round_trip_is_bit_equal_for_any_byte(n: int, k: int) -> None:
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    resident = prepare_weight(packed, BLOCKS)
    assert resident.shape == packed.shape
    assert_equal(restore_weight(resident, BLOCKS), packed)


@pytest.mark.parametrize("weight", [torch.ones(17, 32, dtype=torch.uint8), torch.ones(16, 24, dtype=torch.uint8)])
def test_extents_off_the_block_and_int8_codes_stay_row_major(weight: Tensor) -> None:
    assert prepare_weight(weight, BLOCKS) is weight
    wide = torch.ones(32, 64, dtype=torch.int8)
    assert prepare_weight(wide, BLOCKS) is wide


def test_weights_stacked_along_n_are_stacked_in_memory() -> None:
    parts = [torch.randint(0, 256, (n, 48), dtype=torch.uint8) for n in (16, 64, 32)]
    stacked = torch.cat([prepare_weight(part, BLOCKS) for part in parts])
    assert_equal(stacked, prepare_weight(torch.cat(parts), BLOCKS))


def test_a_non_contiguous_weight_is_prepared_from_its_values() -> None:
    packed = torch.randint(0, 256, (64, 32), dtype=torch.uint8)
    assert_equal(prepare_weight(packed.t().contiguous().t(), BLOCKS), prepare_weight(packed, BLOCKS))


def test_the_eight_bytes_of_a_lane_are_its_tensor_core_fragment() -> None:
    # lane (g, t) of m16n8k32: rows g and g + 8, columns 4t .. 4t + 3 and 16 + 4t .. 16 + 4t + 3
    codes = make_codes(32, 64)
    resident = prepare_weight(pack_int4(codes), BLOCKS).flatten().view(2, 2, 32, 8)  # (n block, k block, lane, byte)
    for lane in range(32):
        g, t = divmod(lane, 4)
        low, high = unpack_int4(resident[1, 1, lane]).view(8, 2).unbind(1)
        columns = 32 + 4 * t + torch.tensor([0, 1, 2, 3, 16, 17, 18, 19])
        assert_equal(low, codes[16 + g, columns])
        assert_equal(high, codes[16 + g + 8, columns])


def test_reference_multiplies_the_resident_weight() -> None:
    a, b = make_codes(5, 128), pack_int4(make_codes(32, 128, seed=1))
    a_scale, b_scale = make_scale(5), make_scale(32, seed=1)
    expected = scaled_mm(a, b, a_scale, b_scale)
    assert_equal(scaled_mm(a, prepare_weight(b, BLOCKS), a_scale, b_scale, b_layout=BLOCKS), expected)
