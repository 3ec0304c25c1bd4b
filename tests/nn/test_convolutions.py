from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tcaq_lightning.artifact.blobs import fuse, restore, stored_tensors
from tcaq_lightning.artifact.freeze import freeze
from tcaq_lightning.artifact.structure import describe, rebuild
from tcaq_lightning.nn.convolutions import exchanged
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.nn.state import full_precision
from tests.toy_layers import config, groups

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (9,)),
    "Conv1d, circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (9,)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 2), stride=(1, 2, 2)), (3, 4, 4)),
    "Conv3d, groups": (lambda: nn.Conv3d(4, 6, 3, groups=2, padding="same"), (3, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (5,)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, bias=False), (3, 4)),
    "ConvTranspose2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (3, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2, dilation=2), (3, 4, 2)),
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        y: Tensor = self.layer(input=sample)
        return y


def make(name: str) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    layer, spatial = LAYERS[name]
    return Model(layer()).requires_grad_(False).eval(), torch.randn(3, 4, *spatial)


@pytest.mark.parametrize("name", LAYERS)
def test_off_it_is_the_original_and_the_weight_has_a_scale_for_each_output_channel(name: str) -> None:
    model, x = make(name)
    source, expected = model.layer, model(x, 0)
    rows = quantize(model, config(), groups())
    assert [row.bits for row in rows] == ["W4 A6"]
    with full_precision(model):
        assert torch.equal(model(x, torch.tensor([0, 900, 0])), expected)
    (layer,) = quant_layers(model).values()
    quantizer = layer.input_quantizer
    quantizer.r.copy_(torch.tensor([0.8, 1.0, 1.2, 1.4]))  # goes out in the weight again
    layer.search_weight()
    assert layer.weight_quantizer.scale.shape == (6,)
    largest = (layer.weight - source.weight).abs().amax()  # type: ignore[operator]
    assert 0 < largest < 0.25 * source.weight.abs().amax()  # type: ignore[union-attr, operator]
    quantizer.delta.fill_(8 / 63)
    quantizer.zero_point.fill_(32)
    error = (model(x, torch.tensor([0, 900, 0])) - expected).square().sum() / expected.square().sum()
    assert 0 < error < 0.2


@pytest.mark.parametrize("name", LAYERS)
def test_its_artifact_computes_the_same_bits(name: str) -> None:
    model, x = make(name)
    quantize(model, config(), groups())
    for layer in quant_layers(model).values():
        layer.input_quantizer.r.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
        layer.input_quantizer.delta.fill_(8 / 63)
        layer.input_quantizer.zero_point.fill_(32)
        layer.search_weight()
    freeze(model)
    opened, _ = make(name)
    rebuild(opened, describe(model))
    restore(stored_tensors(opened), fuse(stored_tensors(model)))
    assert torch.equal(opened(x, 0), model(x, 0))


def test_exchanging_axes_is_its_own_inverse() -> None:
    weight = torch.randn(6, 2, 3)
    for count in (1, 2, 3):
        assert torch.equal(exchanged(exchanged(weight, count), count), weight)


def test_a_transposed_convolution_takes_the_size_of_its_output() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, stride=2).requires_grad_(False)
    x = torch.randn(2, 4, 5)
    model = Model(layer)
    quantize(model, config(), groups())
    with full_precision(model), model._grouping.groups.using(torch.zeros(2, dtype=torch.long)):
        assert torch.equal(model.layer(x, output_size=[12]), layer(x, output_size=[12]))
