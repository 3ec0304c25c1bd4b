"""The example of docs/extending.md: a backend in a file outside of the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tcaq_lightning import load_quantized
from tcaq_lightning.backends.base import layer_kernels
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.latency import backends
from tcaq_lightning.runtime.extensions import load_extensions
from tests.backends.conftest import artifact  # noqa: F401 - a fixture

EXAMPLE = Path(__file__).parents[2] / "docs" / "extending" / "backend.py"


def test_a_backend_of_ones_own_opens_an_artifact(artifact: Path) -> None:  # noqa: F811 - the fixture
    load_extensions([str(EXAMPLE)])
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 70])
    simulated = load_quantized(artifact).unet(x, t).sample
    all_layers = load_quantized(artifact, backend="weight_only").unet(x, t).sample
    one_layer = load_quantized(artifact, backend="weight_only", layers="conv_in").unet(x, t).sample
    assert torch.equal(load_quantized(artifact, backend="weight_only", layers="none").unet(x, t).sample, simulated)
    assert not torch.equal(one_layer, simulated)
    assert not torch.equal(one_layer, all_layers)
    reasons = {kernel.reason for kernel in layer_kernels(load_quantized(artifact).unet, "weight_only")}
    assert reasons == {"its input stays in full precision"}
    assert "weight_only" in backends()
    with pytest.raises(UserError, match="packed: backend 'weight_only' has no such option; it has layers"):
        load_quantized(artifact, backend="weight_only", packed=False)
