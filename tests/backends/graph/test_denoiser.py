from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tcaq_lightning.artifact.structure import describe
from tcaq_lightning.backends.graph.denoiser import GraphDenoiser
from tcaq_lightning.backends.graph.layers import GraphLayer
from tcaq_lightning.config import LayerRule
from tcaq_lightning.errors import UserError

CASES = [
    {"bits": 4},
    {"bits": 8},
    {"bits": 4, "boundaries": []},
    {"bits": 4, "softmax": "log"},
    {"bits": 6, "softmax": "mixed", "rules": [LayerRule("*", activation_bits=6, softmax_bits=4)]},
    {"bits": 8, "symmetric": False},
    {"bits": 4, "integer_ready": True},
    {"bits": 8, "integer_ready": True, "boundaries": []},
    {"bits": 4, "integer_ready": True, "rules": [LayerRule("*.conv2", activation_bits=7)]},
    {"bits": 8, "integer_ready": True, "symmetric": False, "rules": [LayerRule("*1", weight_bits=6)]},
    {"bits": 4, "rules": [LayerRule("conv_in", keep=True), LayerRule("mid_block.attentions.0", keep=True)]},
    {"bits": 4, "rules": [LayerRule("down_blocks.1.attentions.0.to_k", activation_bits=5)]},
]


def graph_of(denoiser: Any) -> GraphDenoiser:
    return GraphDenoiser(denoiser, describe(denoiser).boundaries).eval()


def inputs() -> tuple[Tensor, Tensor]:
    """Samples of all groups in one batch; one timestep is a boundary."""
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([3.0, 30.0, 70.0, 99.0])


def outputs(module: nn.Module, names: set[str], call: Callable[[], Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if name in names:
            layer.register_forward_hook(lambda _m, _a, y, name=name: found.__setitem__(name, y))
    with torch.no_grad():
        found["prediction"] = call()
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_graph_computes_what_is_simulated(case: dict[str, Any], frozen: Callable[..., Any]) -> None:
    denoiser = frozen(levels=2, **case)
    graph = graph_of(denoiser)
    x, t = inputs()
    # attention projections that share an input are computed without calling the layer
    names = {n for n, m in graph.denoiser.named_modules() if isinstance(m, GraphLayer) and ".to_" not in n}
    expected = outputs(denoiser, names, lambda: denoiser(x, t, return_dict=False)[0])
    got = outputs(graph.denoiser, names, lambda: graph(x, t))
    assert got.keys() == expected.keys()
    # The first layer reads equal inputs: equal but for float sums. Behind it, single values fall to the other side.
    first = "time_embedding.linear_1"
    assert torch.allclose(got[first], expected[first], rtol=1e-5, atol=1e-5)
    for name, values in expected.items():
        error = (got[name] - values).square().sum() / values.square().sum()
        assert error < (3e-3 if case.get("integer_ready") else 1e-3), name


def test_the_original_stays(frozen: Callable[..., Any]) -> None:
    denoiser = frozen()
    x, t = inputs()
    before = denoiser(x, t, return_dict=False)[0]
    graph_of(denoiser)
    assert torch.equal(denoiser(x, t, return_dict=False)[0], before)


def test_an_unknown_layer_is_named(frozen: Callable[..., Any]) -> None:
    denoiser = copy.deepcopy(frozen())

    class Other(type(denoiser.conv_out)):  # type: ignore[misc]
        pass

    denoiser.conv_out.__class__ = Other
    with pytest.raises(UserError, match=r"unsupported layer conv_out \(Other\).*QuantConv2d"):
        graph_of(denoiser)
