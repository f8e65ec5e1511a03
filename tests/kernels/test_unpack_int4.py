import torch

from convrot_kernels import pack_int4, unpack_int4
from convrot_kernels.testing import assert_equal

OP = "unpack_int4"


def test_every_byte(backend: str, device: str) -> None:
    packed = torch.arange(256, dtype=torch.uint8, device=device)
    codes = unpack_int4(packed)
    signed = [nibble - 16 if nibble > 7 else nibble for nibble in range(16)]
    expected = [signed[nibble] for byte in range(256) for nibble in (byte & 15, byte >> 4)]
    assert codes.dtype == torch.int8
    assert codes.tolist() == expected
    assert_equal(pack_int4(codes), packed)


def test_any_rank_and_empty(backend: str, device: str) -> None:
    packed = torch.randint(0, 256, (2, 3, 8), dtype=torch.uint8, device=device)
    assert unpack_int4(packed).shape == (2, 3, 16)
    assert_equal(unpack_int4(packed)[1, 2], unpack_int4(packed[1, 2]))
    assert unpack_int4(packed[:, :0]).shape == (2, 0, 16)


def test_non_contiguous_and_oddly_placed_inputs(backend: str, device: str) -> None:
    packed = torch.randint(0, 256, (32, 33), dtype=torch.uint8, device=device)
    for view in (packed[:, 1:], packed.t(), packed[::2, ::2], packed[:1].expand(5, 33)):
        assert_equal(unpack_int4(view), unpack_int4(view.contiguous()))


def test_input_is_not_changed(backend: str, device: str) -> None:
    packed = torch.randint(0, 256, (4, 8), dtype=torch.uint8, device=device)
    before = packed.clone()
    unpack_int4(packed)
    assert_equal(packed, before)
