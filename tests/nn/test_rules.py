from __future__ import annotations

from typing import Any

import pytest

from tcaq_lightning.config import LayerRule, QuantizationConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.nn.rules import bits_of
from tests.toy_layers import config, groups


def test_a_rule_quantizes_the_prediction_too() -> None:
    ready = QuantizationConfig(integer_ready=True)
    assert bits_of("conv_out", ready, "output").output is None
    assert bits_of("down.conv_out", ready).output == 8
    ready.rules = [LayerRule("conv_*", float_output=False)]
    assert bits_of("conv_out", ready, "output").output == 8
    assert bits_of("conv_out", QuantizationConfig(rules=ready.rules), "output").output is None


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


@pytest.mark.parametrize("pattern", ["conv_inn", "mid_block", "up_blocks.?"])
def test_a_rule_that_changes_nothing_is_a_users_mistake(make_unet: Any, pattern: str) -> None:
    with pytest.raises(UserError, match="matches no") as caught:
        quantize(make_unet(), config(LayerRule(pattern, keep=True)), groups())
    assert repr(pattern) in str(caught.value)


def test_a_rule_about_outputs_leaves_kept_layers_kept(make_unet: Any) -> None:
    rules = [LayerRule("conv_in", keep=True), LayerRule("*", float_output=True)]
    assert bits_of("conv_in", QuantizationConfig(rules=rules, integer_ready=True)).kept
    quantized_again = [*rules, LayerRule("conv_in", weight_bits=8)]
    assert bits_of("conv_in", QuantizationConfig(rules=quantized_again)).weight == 8
    with pytest.raises(UserError, match="float_output, which is about quantized outputs"):
        quantize(make_unet(), QuantizationConfig(rules=rules), groups())
