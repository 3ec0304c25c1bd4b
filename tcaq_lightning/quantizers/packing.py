"""Bit packing: codes of 2 to 8 bits as one little-endian bit stream.

Eight codes of b bits are b whole bytes, so every width is packed by whole-tensor operations on groups of eight. The
first code takes the lowest bits: 4-bit codes lie two a byte, low half first, and 6-bit codes four in three bytes.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

GROUP = 8
"""Codes that are packed together."""


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take.

    >>> packed_size(3, bits=4), packed_size(4, bits=6)
    (2, 3)
    """
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        codes: uint8 in [0, 2^b - 1], any shape.
        bits: code width b, 2..8.

    Returns:
        (packed_size(codes.numel(), bits),) uint8; unused bits of the last byte are 0.

    Raises:
        ValueError: another width or dtype, or a code out of range.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), bits=4)
    tensor([33,  3], dtype=torch.uint8)
    """
    _check(codes, bits)
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >= 2**bits:
        raise ValueError(f"codes of {bits} bits must be in 0..{2**bits - 1}, got {int(flat.max())}")
    if bits == 8:
        return flat.clone()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
    words = torch.zeros(padded.shape[0], dtype=torch.long, device=codes.device)  # at most 56 bits of 64
    for i in range(GROUP):
        words |= padded[:, i].long() << (i * bits)
    packed = codes.new_empty(padded.shape[0], bits)
    for i in range(bits):
        packed[:, i] = (words >> (8 * i)) & 0xFF
    return packed.view(-1)[: packed_size(flat.numel(), bits)].clone()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: (packed_size(count, bits),) uint8.
        bits: code width b, 2..8.
        count: number of codes.

    Returns:
        (count,) uint8.

    Raises:
        ValueError: another width or dtype, or not as many bytes as the codes take.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), bits=4, count=3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    _check(packed, bits)
    if packed.shape != (packed_size(count, bits),):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, got shape {tuple(packed.shape)}"
        )
    if bits == 8:
        return packed.clone()
    if bits == 4 and sys.byteorder == "little":
        pairs = packed.to(torch.int16)
        return (pairs | (pairs << 4)).bitwise_and_(0x0F0F).view(torch.uint8)[:count]
    together = GROUP // math.gcd(GROUP, bits)  # codes that begin and end with whole bytes
    size = together * bits // 8
    if missing := -packed.numel() % size:
        packed = torch.nn.functional.pad(packed, (0, missing))
    octets = torch.stack(packed.view(-1, size).unbind(1))  # (bytes, groups): whole rows are vectorised
    codes = packed.new_empty(octets.shape[1], together)
    for i in range(together):
        first, shift = divmod(i * bits, 8)
        code = octets[first] >> shift
        if shift + bits > 8:  # the code goes on in the next byte
            code |= octets[first + 1] << (8 - shift)
        codes[:, i] = code if shift + bits == 8 else code.bitwise_and_(2**bits - 1)
    return codes.view(-1)[:count]


def _check(tensor: Tensor, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in 2..8, got {bits}")
    if tensor.dtype is not torch.uint8:
        raise ValueError(f"expected a uint8 tensor, got {tensor.dtype}")
