from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.runtime.seeds import derive

PARTS = st.lists(st.integers(0, 10_000), min_size=1, max_size=6)


@given(PARTS, st.integers(0, 500_000), st.integers(0, 500_000))
def test_samples_of_one_set_never_share_their_noise(parts: list[int], first: int, second: int) -> None:
    low = [derive(*parts, number) % 2**32 for number in (first, second)]
    assert (low[0] == low[1]) == (first == second)


@given(PARTS)
def test_every_generator_takes_them(parts: list[int]) -> None:
    seed = derive(*parts)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)


def test_the_order_of_the_parts_counts() -> None:
    assert derive(0, 1, 2) != derive(0, 2, 1)
