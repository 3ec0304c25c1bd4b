from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import normalization as diffusers_normalization
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.embeddings import AttentionPooling
from torch import nn

from tcaq_lightning.config import LayerRule
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.attention import QuantAttnProcessor
from tcaq_lightning.nn.coverage import uncovered
from tcaq_lightning.nn.layers import QuantConv2d, QuantLinear
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.nn.prepare import quantize
from tests.toy_layers import Model, config, groups


def test_coverage_lists_every_layer_and_attention_matmul(make_unet: Any) -> None:
    unet = make_unet()
    layers = {n: type(m) for n, m in unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    attentions = [n for n, m in unet.named_modules() if isinstance(m, Attention)]
    parameters = sum(p.numel() for p in unet.parameters())
    rows = quantize(unet, config(), groups())
    listed = {row.name: row for row in rows}
    assert len(listed) == len(rows)
    for name, kind in layers.items():
        assert listed[name].bits == "W4 A6"
        assert isinstance(unet.get_submodule(name), {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}[kind])
    assert len(attentions) >= 3
    for name in attentions:
        assert listed[f"{name} (q k^T)"].bits == "A6 A6"
        assert listed[f"{name} (P v)"].bits == "P7 A6"
        assert isinstance(unet.get_submodule(name).processor, QuantAttnProcessor)
    assert sum(row.parameters for row in rows) == parameters
    assert uncovered(unet, rows) == []
    assert not [m for m in unet.modules() if type(m) in (nn.Conv2d, nn.Linear)]


def test_kept_layers_stay_and_are_listed(make_unet: Any) -> None:
    unet = make_unet()
    conv_in = unet.conv_in
    rows = quantize(
        unet, config(LayerRule("conv_in", keep=True), LayerRule("mid_block.attentions.0", keep=True)), groups()
    )
    assert unet.conv_in is conv_in
    assert isinstance(unet.mid_block.attentions[0].processor, AttnProcessor2_0)
    kept = [row.name for row in rows if row.note == "kept by rule"]
    assert kept == ["conv_in", "mid_block.attentions.0 (q k^T)", "mid_block.attentions.0 (P v)"]
    unet(torch.randn(2, 1, 8, 8), 0)


@pytest.mark.parametrize("layer", [nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2), nn.Bilinear(2, 2, 2)])
def test_unsupported_layers_are_named(layer: nn.Module) -> None:
    with pytest.raises(UserError, match="unsupported layer odd") as caught:
        quantize(Model(odd=layer), config(), groups())
    assert "\n" not in str(caught.value)
    rows = quantize(Model(odd=layer), config(LayerRule("odd", keep=True)), groups())
    assert [(row.name, row.bits) for row in rows] == [("odd", "float")]


def test_matmuls_of_unknown_attentions_are_listed_as_float_and_their_layers_quantized() -> None:
    sliced = Attention(query_dim=8, heads=2, dim_head=4)
    sliced.set_processor(SlicedAttnProcessor(1))
    model = Model(odd=sliced, pool=AttentionPooling(num_heads=2, embed_dim=8))
    rows = {row.name: row for row in quantize(model, config(), groups())}
    for matmul in ("q k^T", "P v"):
        row = rows[f"odd ({matmul})"]
        assert (row.bits, row.note) == ("float", "unknown attention: SlicedAttnProcessor")
    assert rows["pool (P v)"].bits == "P7 A6"  # found by its softmax
    assert isinstance(sliced.processor, SlicedAttnProcessor)
    assert {n for n, row in rows.items() if row.bits == "W4 A6"} == set(quant_layers(model))
    assert set(quant_layers(model)) == {f"odd.to_{n}" for n in ("q", "k", "v", "out.0")} | {
        f"pool.{n}_proj" for n in "qkv"
    }
    assert rows["pool.positional_embedding"].bits == "float"


def test_parameters_of_blocks_are_listed() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(6, 2))
            self.linear = nn.Linear(2, 2)

    model = Model(block=Gated(), norm=diffusers_normalization.RMSNorm(2, 1e-6))
    rows = quantize(model, config(), groups())
    assert [(row.name, row.bits) for row in rows] == [
        ("block.table", "float"),
        ("block.linear", "W4 A6"),
        ("norm.weight", "float"),
    ]
    assert sum(row.parameters for row in rows) == 12 + 6 + 2


def test_a_weight_of_a_block_that_may_be_a_products_is_refused() -> None:
    attention = nn.MultiheadAttention(4, 1)  # its in_proj_weight is no layer's
    with pytest.raises(UserError, match="unsupported layer odd"):
        quantize(Model(odd=attention), config(), groups())


def test_a_layer_under_two_names_is_refused() -> None:
    shared = nn.Linear(2, 2)
    with pytest.raises(UserError, match="shares its weights"):
        quantize(Model(a=shared, b=shared), config(), groups())
