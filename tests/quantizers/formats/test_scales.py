from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcaq_lightning.quantizers.formats.scales import (
    FloatScales,
    GlobalScales,
    PowerOfTwoScales,
    QuantizedScales,
    ScaleType,
)

TYPES = [ScaleType(), FloatScales(torch.float16), PowerOfTwoScales(), GlobalScales(), QuantizedScales(4)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TYPES), st.lists(st.floats(2.0**-40, 2.0**40, width=32), min_size=1, max_size=12))
def test_what_can_be_stored_is_stored_exactly_and_is_positive(kind: ScaleType, values: list[float]) -> None:
    scales = torch.tensor(values)
    outer = kind.outer(scales)
    assert (0 if outer is None else outer.numel()) == kind.outer_size(len(values))
    once = kind.storable(scales, outer)
    assert bool((once > 0).all())
    assert torch.equal(kind.storable(once, outer), once)
    stored = kind.encode(once, outer)
    assert stored.dtype is (kind.dtype or torch.float32)
    assert torch.equal(kind.decode(stored, outer), once)


@pytest.mark.parametrize(("kind", "error"), [(TYPES[1], 2**-11), (TYPES[2], 2**0.5 - 1), (TYPES[3], 2**-4)])
def test_scales_are_rounded_to_the_nearest(kind: ScaleType, error: float) -> None:
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.01
    rounded = kind.storable(scales, kind.outer(scales))
    assert float((rounded / scales - 1).abs().max()) <= error * (1 + 1e-5)
