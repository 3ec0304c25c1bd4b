"""The example of docs/extending.md: a family in a file outside of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tcaq_lightning.config import ActivationConfig, LayerRule, QuantizationConfig, WeightConfig
from tcaq_lightning.models.graph import trace_units
from tcaq_lightning.nn.output_layers import output_layer
from tcaq_lightning.nn.prepare import quantize, shared_copy
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.extensions import load_extensions

EXAMPLE = Path(__file__).parents[2] / "docs" / "extending" / "family.py"


@pytest.fixture(scope="module")
def denoiser() -> Any:
    from tcaq_lightning.models.families import FAMILIES

    load_extensions([str(EXAMPLE)])
    module = __import__(FAMILIES["StagedDenoiser"].__module__, fromlist=["StagedDenoiser"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return module.StagedDenoiser().eval().requires_grad_(False)


def test_stages_are_units_with_an_output_layer(denoiser: Any) -> None:
    graph = trace_units(denoiser, lambda: denoiser(torch.randn(2, 4), torch.tensor([1.0, 900.0])))
    assert graph.names == ["stem", "stages.0", "stages.1", "head"]
    assert output_layer(denoiser.stages[1], "stages.1") == ("stages.1.narrow", 1.0)


def test_rules_by_role_find_its_layers(denoiser: Any) -> None:
    rules = [LayerRule(role=role, weight_bits=8, activation_bits=8) for role in ("input", "output", "time")]
    config = QuantizationConfig(WeightConfig(bits=4), ActivationConfig(bits=4), rules=rules)
    quantized = shared_copy(denoiser)
    rows = {row.name: (row.role, row.bits) for row in quantize(quantized, config, TimestepGroups([500.0]))}
    assert rows["stem"] == ("input", "W8 A8")
    assert rows["head"] == ("output", "W8 A8")
    assert rows["stages.0.to_time"] == ("time", "W8 A8")
    assert rows["stages.1.widen"] == rows["stages.1.narrow"] == ("block", "W4 A4")
    x, t = torch.randn(3, 4), torch.tensor([1.0, 400.0, 900.0])
    with full_precision(quantized):
        assert torch.allclose(quantized(x, t), denoiser(x, t))
