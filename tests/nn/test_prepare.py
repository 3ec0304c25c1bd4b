from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    FusedAttnProcessor2_0,
)
from torch import nn

from tcaq_lightning.config import LayerRule, QuantizationConfig, WeightConfig
from tcaq_lightning.nn.layers import QuantConv2d, QuantLayer
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.nn.prepare import quantize, shared_copy
from tests.toy_layers import Model, config, groups


def test_integer_ready_quantizes_the_outputs_of_convolutions(make_unet: Any) -> None:
    unet = make_unet()
    rows = {row.name: row.bits for row in quantize(unet, config(), groups())}
    assert not any("O" in bits for bits in rows.values())
    unet = make_unet()
    ready = config(
        LayerRule("conv_in", keep=True),
        LayerRule("*.conv1", activation_bits=8),
        LayerRule("mid_block.resnets.0.conv2", float_output=True),
    )
    ready.integer_ready = True
    rows = {row.name: row.bits for row in quantize(unet, ready, groups())}
    for name, layer in quant_layers(unet).items():
        quantized = isinstance(layer, QuantConv2d) and name not in ("conv_out", "mid_block.resnets.0.conv2")
        assert (layer.output_quantizer is not None) == quantized, name
        assert rows[name].endswith(" O8") == quantized
        # codes of 8 bits must lie around one zero point to fit into 8 bits, narrower ones need not
        assert layer.input_quantizer.constant_zero == (quantized and name.endswith("conv1"))
    assert rows["mid_block.resnets.0.conv1"] == "W4 A8 O8"
    assert rows["conv_in"] == "float"


def test_outputs_of_asymmetric_8_bit_weights_stay_in_float(make_unet: Any) -> None:
    unet = make_unet()
    weight = WeightConfig(bits=8, symmetric=False)
    rows = quantize(
        unet, QuantizationConfig(weight, rules=[LayerRule("conv_in", weight_bits=7)], integer_ready=True), groups()
    )
    assert [row.name for row in rows if "O8" in row.bits] == ["conv_in"]
    assert [layer.name for layer in quant_layers(unet).values() if layer.output_quantizer is not None] == ["conv_in"]


def test_layers_of_named_sequences_are_replaced() -> None:
    model = Model(body=nn.Sequential(OrderedDict(first=nn.Linear(2, 2), second=nn.Linear(2, 2))))
    rows = quantize(model, config(), groups())
    assert [row.name for row in rows] == ["body.first", "body.second"]
    assert all(isinstance(layer, QuantLayer) for layer in model.body)  # type: ignore[union-attr]


def test_q_k_and_v_share_one_quantizer_where_their_bits_agree() -> None:
    attention = Attention(query_dim=8, heads=2, dim_head=4)
    quantize(Model(attn=attention), config(), groups())
    assert attention.to_q.input_quantizer is attention.to_k.input_quantizer is attention.to_v.input_quantizer

    attention = Attention(query_dim=8, heads=2, dim_head=4)
    quantize(Model(attn=attention), config(LayerRule("attn.to_v", activation_bits=8)), groups())
    assert len({id(m.input_quantizer) for m in (attention.to_q, attention.to_k, attention.to_v)}) == 3

    cross = Attention(query_dim=8, heads=2, dim_head=4, cross_attention_dim=6)
    quantize(Model(attn=cross), config(), groups())
    assert cross.to_q.input_quantizer is not cross.to_k.input_quantizer
    assert cross.to_k.input_quantizer is cross.to_v.input_quantizer  # both read the context


def test_a_shared_copy_has_the_same_parameters_and_layers_of_its_own(make_unet: Any) -> None:
    unet = make_unet()
    before = {n: p.clone() for n, p in unet.state_dict().items()}
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 900])
    expected = unet(x, t).sample
    twin = shared_copy(unet)
    quantize(twin, config(), groups())
    shared = {p.data_ptr() for p in unet.parameters()}
    own = [n for n, p in twin.named_parameters() if p.data_ptr() not in shared]
    assert all(n.endswith(".bias") for n in own)  # of quantized layers
    assert not quant_layers(unet)
    assert torch.equal(unet(x, t).sample, expected)
    assert all(torch.equal(p, before[n]) for n, p in unet.state_dict().items())


def test_a_shared_copy_with_fused_projections_leaves_the_model_as_it_is() -> None:
    attention = Attention(query_dim=8, heads=2, dim_head=4, bias=True)
    attention.fuse_projections()
    attention.set_processor(FusedAttnProcessor2_0())
    model = Model(attn=attention).requires_grad_(False)
    attention.to_qkv.weight.mul_(2)  # what counts from now on
    before = {n: p.clone() for n, p in model.state_dict().items()}
    twin = shared_copy(model)
    quantize(twin, config(), groups())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert torch.equal(twin.attn.to_q.learned_weight.weight, before["attn.to_qkv.weight"][:8])
