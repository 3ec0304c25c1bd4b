from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.quantizers.packing import pack, packed_size, unpack


def bit_stream(codes: list[int], bits: int) -> bytes:
    """The little-endian bit stream as one long integer."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


@given(st.integers(2, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=70))))
def test_is_the_bit_stream_and_round_trips(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(tensor, bits)
    assert bytes(packed.tolist()) == bit_stream(codes, bits)
    assert packed.numel() == packed_size(len(codes), bits)
    assert torch.equal(unpack(packed, bits, len(codes)), tensor)


@pytest.mark.parametrize("bits", range(2, 9))
def test_random_tensor_of_many_axes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 3, 7, 11), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.numel() * 8 - codes.numel() * bits in range(8)
    assert torch.equal(unpack(packed, bits, codes.numel()).view_as(codes), codes)
    strided = codes.transpose(0, 2)
    assert torch.equal(unpack(pack(strided, bits), bits, codes.numel()).view(strided.shape), strided)


def test_known_layouts() -> None:
    assert pack(torch.tensor([0x1, 0xF], dtype=torch.uint8), 4).tolist() == [0xF1]
    assert pack(torch.tensor([63, 0, 63, 0], dtype=torch.uint8), 6).tolist() == [0x3F, 0xF0, 0x03]
    assert pack(torch.tensor([3, 250], dtype=torch.uint8), 8).tolist() == [3, 250]


def test_results_have_their_own_memory() -> None:
    codes = torch.arange(8, dtype=torch.uint8)
    for result in (pack(codes, 8), unpack(codes, 8, 8)):
        assert result.data_ptr() != codes.data_ptr()
    assert pack(torch.zeros(1, dtype=torch.uint8), 2).untyped_storage().nbytes() == 1


@pytest.mark.parametrize("bits", range(2, 8))
def test_refuses_codes_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"in 0..{2**bits - 1}, got {2**bits}"):
        pack(torch.tensor([0, 2**bits], dtype=torch.uint8), bits)


def test_refuses_other_widths_dtypes_and_lengths() -> None:
    codes = torch.zeros(4, dtype=torch.uint8)
    for bits in (0, 1, 9):
        with pytest.raises(ValueError, match=r"2\.\.8"):
            pack(codes, bits)
    with pytest.raises(ValueError, match="uint8"):
        pack(codes.float(), 4)
    with pytest.raises(ValueError, match="take 3 bytes"):
        unpack(codes, 4, 5)
