from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcaq_lightning.models.shape_only import Absent, absent

CPU = torch.device("cpu")
GLUE = {
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "pad": lambda x: F.pad(x, (0, 1, 0, 1)),
    "norm": nn.GroupNorm(2, 4).requires_grad_(False),
    "concatenate": lambda x: torch.cat([x, torch.ones(2, 3, 6, 6)], dim=1),
    "add a real one": lambda x: torch.ones(6, 6) + x,
    "reshape": lambda x: x.permute(0, 2, 3, 1).reshape(2, -1, 4),
    "parts": lambda x: x.chunk(2, dim=1)[1],
    "narrow": lambda x: x.to(torch.bfloat16),
    "move": lambda x: x.to("cpu", copy=True),
    "in place": lambda x: x.clone().add_(1),
    "like it": torch.zeros_like,
}


@pytest.mark.parametrize("glue", GLUE)
def test_what_is_computed_of_it_has_the_shape_and_type_of_the_real_one(glue: str) -> None:
    real, nothing = torch.randn(2, 4, 6, 6), absent((2, 4, 6, 6), torch.float32, CPU)
    with torch.no_grad():
        expected: Tensor = GLUE[glue](real)
        got: Tensor = GLUE[glue](nothing)
    assert isinstance(got, Absent)
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    assert got.stride() == expected.stride()


def test_it_has_no_values() -> None:
    nothing = absent((2,), torch.float32, CPU)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(nothing.isnan().any())
    assert repr(nothing) == "Absent(shape=(2,), dtype=torch.float32)"
