from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from tcaq_lightning.calibration.unit_data import UnitData

Prepared = tuple[Any, nn.Module, UnitData]


@pytest.fixture
def prepare(make_twins: Any, initialized: Any) -> Callable[[str], Prepared]:
    """A unit of the quantized twin, initialized."""

    def run(name: str) -> Prepared:
        twins = make_twins(samples=16)
        unit, data, _ = initialized(twins, name)
        return twins, unit, data

    return run
