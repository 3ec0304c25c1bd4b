from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from diffusers.models import normalization as diffusers_normalization
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.embeddings import AttentionPooling
from torch import nn

from tcaq_lightning.config import ActivationConfig, LayerRule, QuantizationConfig, SoftmaxConfig, WeightConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.attention import QuantAttnProcessor
from tcaq_lightning.nn.layers import QuantConv2d, QuantLayer, QuantLinear
from tcaq_lightning.nn.prepare import (
    bits_of,
    full_precision,
    quant_layers,
    quantization_state,
    quantize,
    quantizers,
    restore_quantization_state,
    settle,
    shared_copy,
    uncovered,
)
from tcaq_lightning.quantizers import Rounding
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


def config(*rules: LayerRule) -> QuantizationConfig:
    return QuantizationConfig(
        weight=WeightConfig(bits=4),
        activation=ActivationConfig(bits=6),
        softmax=SoftmaxConfig(bits=7),
        rules=list(rules),
    )


def groups() -> TimestepGroups:
    return TimestepGroups([500.0])


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


def test_a_rule_quantizes_the_prediction_too() -> None:
    ready = QuantizationConfig(integer_ready=True)
    assert bits_of("conv_out", ready, "output").output is None
    assert bits_of("down.conv_out", ready).output == 8
    ready.rules = [LayerRule("conv_*", float_output=False)]
    assert bits_of("conv_out", ready, "output").output == 8
    assert bits_of("conv_out", QuantizationConfig(rules=ready.rules), "output").output is None


def test_a_rule_about_outputs_leaves_kept_layers_kept(make_unet: Any) -> None:
    rules = [LayerRule("conv_in", keep=True), LayerRule("*", float_output=True)]
    assert bits_of("conv_in", QuantizationConfig(rules=rules, integer_ready=True)).kept
    quantized_again = [*rules, LayerRule("conv_in", weight_bits=8)]
    assert bits_of("conv_in", QuantizationConfig(rules=quantized_again)).weight == 8
    with pytest.raises(UserError, match="float_output, which is about quantized outputs"):
        quantize(make_unet(), QuantizationConfig(rules=rules), groups())


def test_outputs_of_asymmetric_8_bit_weights_stay_in_float(make_unet: Any) -> None:
    unet = make_unet()
    weight = WeightConfig(bits=8, symmetric=False)
    rows = quantize(
        unet, QuantizationConfig(weight, rules=[LayerRule("conv_in", weight_bits=7)], integer_ready=True), groups()
    )
    assert [row.name for row in rows if "O8" in row.bits] == ["conv_in"]
    assert [layer.name for layer in quant_layers(unet).values() if layer.output_quantizer is not None] == ["conv_in"]


@pytest.mark.parametrize("integer_ready", [False, True])
def test_quantized_unet_switched_to_full_precision_is_the_original(make_twins: Any, integer_ready: bool) -> None:
    twins = make_twins(QuantizationConfig(integer_ready=integer_ready))
    with full_precision(twins.quantized):
        got = twins.quantized(twins.x, twins.timesteps).sample
    torch.testing.assert_close(got, twins.full(twins.x, twins.timesteps).sample, rtol=1e-4, atol=1e-5)
    assert all(q.enabled for q in quantizers(twins.quantized).values())
    assert all(layer.learned_weight.rounding is Rounding.HARD for layer in quant_layers(twins.quantized).values())


def test_rules_apply_in_order() -> None:
    rules = (
        LayerRule("*", weight_bits=5),
        LayerRule("mid*", weight_bits=8, activation_bits=3),
        LayerRule("mid.attn", softmax_bits=8),
        LayerRule("out", keep=True),
    )
    found = {name: bits_of(name, config(*rules)) for name in ("conv", "mid.conv", "mid.attn", "out")}
    assert (found["conv"].weight, found["conv"].activation, found["conv"].softmax) == (5, 6, 7)
    assert (found["mid.conv"].weight, found["mid.conv"].activation, found["mid.conv"].softmax) == (8, 3, 7)
    assert (found["mid.attn"].weight, found["mid.attn"].softmax) == (8, 8)
    assert found["out"].kept
    assert bits_of("mid.conv", config(*reversed(rules))).weight == 5


def test_bits_follow_the_rules(make_unet: Any) -> None:
    unet = make_unet()
    rules = (LayerRule("conv_*", weight_bits=8, activation_bits=8), LayerRule("mid_block.attentions.0", softmax_bits=3))
    quantize(unet, config(*rules), groups())
    assert (unet.conv_in.weight_quantizer.bits, unet.conv_in.input_quantizer.bits) == (8, 8)
    hidden = unet.mid_block.resnets[0].conv1
    assert (hidden.weight_quantizer.bits, hidden.input_quantizer.bits) == (4, 6)
    processor = unet.mid_block.attentions[0].processor
    assert (processor.probabilities.bits, processor.query.bits) == (3, 6)


def test_a_rule_about_a_role_does_what_one_about_its_layers_names_does(make_unet: Any) -> None:
    by_role = [LayerRule(role="input", weight_bits=8), LayerRule(role="shortcut", activation_bits=8)]
    by_name = [LayerRule("conv_in", weight_bits=8), LayerRule("*.conv_shortcut", activation_bits=8)]
    rows = [quantize(make_unet(), config(*rules), groups()) for rules in (by_role, by_name)]
    assert rows[0] == rows[1]
    found = {row.name: (row.bits, row.role) for row in rows[0]}
    assert found["conv_in"] == ("W8 A6", "input")
    assert found["up_blocks.0.resnets.0.conv_shortcut"] == ("W4 A8", "shortcut")
    assert found["conv_out"] == ("W4 A6", "output")
    assert found["mid_block.resnets.0.conv1"] == ("W4 A6", "block")


def test_a_rule_about_blocks_is_about_attentions_too(make_unet: Any) -> None:
    rows = quantize(make_unet(), config(LayerRule(role="block", softmax_bits=3)), groups())
    assert {row.bits for row in rows if row.name.endswith("(P v)")} == {"P3 A6"}


def test_a_role_that_a_model_has_no_layers_of_is_no_mistake(make_unet: Any) -> None:
    rows = quantize(make_unet(), config(LayerRule(role="modulation", weight_bits=8)), groups())
    assert not any("W8" in row.bits for row in rows)


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


@pytest.mark.parametrize("pattern", ["conv_inn", "mid_block", "up_blocks.?"])
def test_a_rule_that_changes_nothing_is_a_users_mistake(make_unet: Any, pattern: str) -> None:
    with pytest.raises(UserError, match="matches no") as caught:
        quantize(make_unet(), config(LayerRule(pattern, keep=True)), groups())
    assert repr(pattern) in str(caught.value)


class Model(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 2), nn.Bilinear(2, 2, 2)])
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
    for attention, kind in (("odd", "SlicedAttnProcessor"), ("pool", "AttentionPooling")):
        for matmul in ("q k^T", "P v"):
            row = rows[f"{attention} ({matmul})"]
            assert (row.bits, row.note) == ("float", f"unknown attention: {kind}")
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
    with pytest.raises(UserError, match="unsupported layer odd "):
        quantize(Model(odd=attention), config(), groups())


def test_a_layer_under_two_names_is_refused() -> None:
    shared = nn.Linear(2, 2)
    with pytest.raises(UserError, match="shares its weights"):
        quantize(Model(a=shared, b=shared), config(), groups())


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


def test_state_round_trip_leaves_full_precision_weights_alone(make_twins: Any) -> None:
    twins = make_twins()
    unit = twins.unit("mid_block.attentions.0")
    before = quantization_state(unit)
    assert not [k for k in before if k.endswith((".weight", ".bias"))]
    weights = {n: p.clone() for n, p in unit.named_parameters()}
    for value in quantization_state(unit).values():
        assert not any(value is b for b in unit.buffers())
    for buffer in unit.buffers():
        buffer.add_(1)
    restore_quantization_state(unit, before)
    assert all(torch.equal(v, before[k]) for k, v in quantization_state(unit).items())
    assert all(torch.equal(p, weights[n]) for n, p in unit.named_parameters())
    with pytest.raises(KeyError):
        restore_quantization_state(twins.unit("mid_block.resnets.0"), before)


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


def test_settled_layers_compute_the_same_and_are_restored_with_their_logits(make_twins: Any, initialized: Any) -> None:
    twins = make_twins()
    unit, data, _ = initialized(twins, "mid_block.attentions.0")

    def output() -> torch.Tensor:
        with torch.no_grad():
            return data.run(unit, twins.context, torch.arange(len(data)), torch.device("cpu"))

    hard, state = output(), quantization_state(unit)
    settle(unit)
    assert torch.equal(output(), hard)
    without = quantization_state(unit)
    assert set(state) - set(without) == {f"{n}.weight_quantizer.v" for n in quant_layers(unit)}
    restore_quantization_state(unit, state)
    assert torch.equal(output(), hard)
    assert all(torch.equal(v, state[k]) for k, v in quantization_state(unit).items())
    restore_quantization_state(unit, without)
    assert all(layer.learned_weight.v is None for layer in quant_layers(unit).values())
    with pytest.raises(KeyError):
        restore_quantization_state(unit, {k: v[:1] if k.endswith(".v") else v for k, v in state.items()})
