import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convrot_kernels import pack_int4, unpack_int4
from convrot_kernels.testing import assert_equal, make_codes

OP = "pack_int4"


def test_low_nibble_is_the_even_column(backend: str, device: str) -> None:
    codes = torch.tensor([1, -1, 7, -7], dtype=torch.int8, device=device)
    assert pack_int4(codes).tolist() == [0xF1, 0x97]


def test_every_pair_of_codes(backend: str, device: str) -> None:
    values = torch.arange(-8, 8, dtype=torch.int8, device=device)
    pairs = torch.cartesian_prod(values, values)
    expected = [[(low & 15) | (high & 15) << 4] for low, high in pairs.tolist()]
    assert pack_int4(pairs).tolist() == expected


@pytest.mark.parametrize("shape", [(2,), (0, 4), (3, 0), (5, 6), (2, 3, 0, 4), (2, 1, 3, 64)])
def test_round_trip_of_any_rank(backend: str, device: str, shape: tuple[int, ...]) -> None:
    codes = make_codes(*shape, device=device)
    packed = pack_int4(codes)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert_equal(unpack_int4(packed), codes)


def test_non_contiguous_and_oddly_placed_inputs(backend: str, device: str) -> None:
    codes = make_codes(64, 65, device=device)
    for view in (codes[:, 1:], codes[:, :64].t(), codes[::2, :64:2], codes[:1, 1:].expand(5, 64)):
        assert_equal(pack_int4(view), pack_int4(view.contiguous()))


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40).filter(lambda codes: len(codes) % 2 == 0))
def test_pack_then_unpack_is_the_identity(codes: list[int]) -> None:
    assert unpack_int4(pack_int4(torch.tensor(codes, dtype=torch.int8))).tolist() == codes
