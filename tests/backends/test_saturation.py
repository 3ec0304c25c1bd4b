from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcaq_lightning.backends.saturation import may_saturate, pair_may_saturate, processor_flags, sums_saturate


def vpmaddubsw(u: np.ndarray, w: np.ndarray) -> int:
    """Sum of products as AVX2 makes it: pairs clipped to 16 bits, then added in 32."""
    products = u.astype(np.int64) * w.astype(np.int64)
    products = np.pad(products, (0, len(products) % 2)).reshape(-1, 2).sum(axis=1)
    return int(np.clip(products, -(2**15), 2**15 - 1).sum())


@settings(max_examples=200)
@given(
    st.lists(st.integers(-128, 127), min_size=1, max_size=8),
    st.integers(2, 8),
    st.permutations(range(8)),
    st.randoms(use_true_random=False),
)
def test_a_layer_that_is_not_listed_never_saturates(codes, bits, order, random) -> None:
    w = np.array(codes)[[i for i in order if i < len(codes)]]
    listed = may_saturate(torch.tensor([codes], dtype=torch.int8), bits)
    u = np.array([random.choice([0, 2**bits - 1, random.randrange(2**bits)]) for _ in w])
    if not listed:
        assert vpmaddubsw(u, w) == int(u @ w)


def test_a_layer_that_is_listed_can_saturate() -> None:
    codes = torch.tensor([[127, 5, 120]], dtype=torch.int8)
    assert may_saturate(codes, 8)
    u, w = np.array([255, 255, 0]), np.array([127, 120, 5])
    assert vpmaddubsw(u, w) != int(u @ w)


def test_codes_of_six_bits_never_saturate() -> None:
    extreme = torch.tensor([[-32] * 4, [31] * 4], dtype=torch.int8)
    assert not may_saturate(extreme, 8)
    assert not pair_may_saturate(8, 6)
    assert pair_may_saturate(8, 8)


@pytest.mark.parametrize(
    ("flags", "machine", "saturates"),
    [
        ({"avx2"}, "x86_64", True),
        (set(), "AMD64", True),
        ({"avx2", "avx512f", "avx512_vnni"}, "x86_64", False),
        ({"avx2", "avx_vnni"}, "x86_64", False),
        (set(), "aarch64", False),
    ],
)
def test_which_processors_add_in_16_bits(flags: set[str], machine: str, saturates: bool) -> None:
    assert sums_saturate(flags, machine) is saturates


def test_flags_of_the_processor(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags\t\t: fpu avx2 avx_vnni\nprocessor : 1\nflags : other\n")
    assert processor_flags(file) == {"fpu", "avx2", "avx_vnni"}
    assert processor_flags(tmp_path / "none") == frozenset()
