"""Sums of 8-bit products in 16 bits: which processors make them, and which layers they are too narrow for.

x86 without VNNI multiplies uint8 by int8 with vpmaddubsw, which adds two products in 16 bits and clips the sum to
[-32768, 32767]. Codes of 255 and 127 give 64,770. VNNI, and the dot products of Arm, add in 32 bits.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

WIDE_SUMS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Flags of x86 processors that add the products in 32 bits."""
X86 = frozenset({"x86_64", "amd64", "i386", "i686"})
INT16 = (-(2**15), 2**15 - 1)
CPUINFO = Path("/proc/cpuinfo")


def processor_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """What this processor says it can do; empty where the system does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())


def sums_saturate(flags: Iterable[str] | None = None, machine: str | None = None) -> bool:
    """Whether a processor adds 8-bit products in 16 bits; the safe answer, yes, where that is unknown.

    Args:
        flags: as /proc/cpuinfo has them; None: of this processor.
        machine: architecture; None: of this processor.

    >>> sums_saturate({"avx2", "fma"}, "x86_64"), sums_saturate({"avx2", "avx_vnni"}, "x86_64")
    (True, False)
    """
    machine = (platform.machine() if machine is None else machine).lower()
    return machine in X86 and not WIDE_SUMS & set(processor_flags() if flags is None else flags)


def may_saturate(codes: Tensor, activation_bits: int) -> bool:
    """Whether two products of uint8 activations with a layer's weights may leave 16 bits, whatever is added to what.

    Args:
        codes: (O, ...) int8 weights.
        activation_bits: activations are in [0, 2^b - 1].

    >>> import torch
    >>> codes = torch.tensor([[127, -3, 1]], dtype=torch.int8)
    >>> may_saturate(codes, 8), may_saturate(codes + codes.new_tensor([0, 3, 1]), 8), may_saturate(codes.flip(1), 7)
    (False, True, False)
    """
    rows = codes.flatten(1).int()
    pair = min(2, rows.shape[1])
    largest = rows.clamp(min=0).topk(pair, dim=1).values.sum(dim=1).max()
    smallest = rows.clamp(max=0).topk(pair, dim=1, largest=False).values.sum(dim=1).min()
    activation = 2**activation_bits - 1
    low, high = INT16
    return bool(int(largest) * activation > high or int(smallest) * activation < low)


def pair_may_saturate(first_bits: int, second_bits: int) -> bool:
    """Whether two products of activations may leave 16 bits: [0, 2^a - 1] by [-2^(b-1), 2^(b-1) - 1].

    >>> pair_may_saturate(8, 8), pair_may_saturate(6, 8), pair_may_saturate(8, 7)
    (True, False, False)
    """
    return bool(2 * (2**first_bits - 1) * 2 ** (second_bits - 1) > -INT16[0])
