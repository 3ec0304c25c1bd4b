from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.initialize import Choices
from tcaq_lightning.config import QuantizationConfig, TCRConfig
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers.range_search import search_symmetric

CPU = torch.device("cpu")
ATTENTION, RESNET = "mid_block.attentions.0", "mid_block.resnets.0"
SOFTMAX = "processor.probabilities"


def prepared(
    make_twins: Any, initialized: Any, name: str, tcr: TCRConfig | None = None
) -> tuple[Any, nn.Module, Any, Choices]:
    twins = make_twins(samples=16)
    return (twins, *initialized(twins, name, tcr))


@pytest.mark.parametrize("name", [RESNET, ATTENTION, "conv_in", "time_embedding"])
def test_searched_r_is_no_worse_than_none(make_twins: Any, initialized: Any, name: str) -> None:
    _, unit, _, choices = prepared(make_twins, initialized, name)
    of_layers = {n for n in quantizers(unit) if n.endswith("input_quantizer")}
    assert set(choices.reparameterization) == of_layers
    for before, after in choices.reparameterization.values():
        assert 0 < after <= before
    for quantizer_name in of_layers:
        r = quantizers(unit)[quantizer_name].r
        assert r.min() >= 0.1 - 1e-6
        assert r.max() <= 10 + 1e-5
    for layer in quant_layers(unit).values():
        weight = layer.learned_weight
        scaled = weight.weight * layer.input_quantizer.r.view(1, -1, *[1] * (weight.weight.ndim - 2))
        assert torch.equal(weight.delta, search_symmetric(scaled.flatten(1), weight.bits))


def test_a_channel_of_another_size_is_worth_an_r(make_twins: Any, initialized: Any) -> None:
    twins = make_twins(samples=16)
    unit = twins.unit(ATTENTION)
    unit.group_norm.weight.data[::4] *= 20  # type: ignore[union-attr, index, operator]
    _, _, choices = initialized(twins, ATTENTION)
    before, after = choices.reparameterization["to_q.input_quantizer"]
    assert after < 0.7 * before
    assert unit.to_q.input_quantizer.r.max() > 1.5  # type: ignore[union-attr, operator]


def test_channels_of_another_centre_are_worth_a_shift(make_twins: Any, observe: Any, initialized: Any) -> None:
    twins = make_twins(samples=16)
    unit, data = twins.unit(ATTENTION), twins.data_of(ATTENTION)
    centres = torch.linspace(-20, 20, 16)
    unit.group_norm.bias.data += centres  # type: ignore[union-attr, operator]
    observed = observe(unit, data, twins.timestep_groups)
    with torch.no_grad(), full_precision(unit):
        expected = data.run(unit, twins.timestep_groups, torch.arange(16), CPU)
    _, _, choices = initialized(twins, ATTENTION)
    before, after = choices.reparameterization["to_q.input_quantizer"]
    assert after < 0.1 * before
    shift = unit.to_q.input_quantizer.shift  # type: ignore[union-attr]
    torch.testing.assert_close(shift, observed.ranges["to_q.input_quantizer"].centre().half().float())
    assert (shift - centres).abs().max() < 3  # type: ignore[operator]
    with torch.no_grad(), full_precision(unit):
        torch.testing.assert_close(
            data.run(unit, twins.timestep_groups, torch.arange(16), CPU), expected, rtol=1e-3, atol=1e-3
        )


def test_without_tcr_r_is_one(make_twins: Any, initialized: Any) -> None:
    _, unit, _, choices = prepared(make_twins, initialized, RESNET, TCRConfig(enabled=False))
    assert choices.reparameterization == {}
    assert all(bool((layer.input_quantizer.r == 1).all()) for layer in quant_layers(unit).values())


def test_the_published_formula_is_within_its_bounds(make_twins: Any, initialized: Any) -> None:
    _, unit, _, _ = prepared(make_twins, initialized, RESNET, TCRConfig(formula="profile", truncation=4.0))
    r = torch.cat([layer.input_quantizer.r for layer in quant_layers(unit).values()])
    assert r.min() >= 1
    assert r.max() <= 4
    assert r.max() > 1


def test_an_initialized_unit_is_close_to_full_precision(make_twins: Any, initialized: Any) -> None:
    for name in (RESNET, ATTENTION):
        twins, unit, data, _ = prepared(make_twins, initialized, name)
        with torch.no_grad():
            output = data.run(unit, twins.timestep_groups, torch.arange(16), CPU)
            with full_precision(unit):
                expected = data.run(unit, twins.timestep_groups, torch.arange(16), CPU)
        assert ((output - expected).square().sum() / expected.square().sum()) < 0.05


@pytest.mark.parametrize("name", [RESNET, "conv_in"])
def test_outputs_are_set_from_quantized_operands(make_twins: Any, initialized: Any, name: str) -> None:
    twins = make_twins(QuantizationConfig(integer_ready=True), samples=16)
    unit, data, _ = initialized(twins, name)
    layers = [layer for layer in quant_layers(unit).values() if layer.output_quantizer is not None]
    assert layers
    for layer in layers:
        assert len(set(layer.input_quantizer.zero_point.tolist())) == 1
        assert len(set(layer.input_quantizer.delta.tolist())) == 2
        output = layer.output_quantizer
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        data.run(unit, twins.timestep_groups, torch.arange(16), CPU)
        handle.remove()
        with twins.timestep_groups.using(data.groups):
            y = layer(inputs[0])
            output.enabled = False
            plain = layer(inputs[0])
            output.enabled = True
        # about as of 256 steps over each channel's range
        step = (plain.amax((0, 2, 3)) - plain.amin((0, 2, 3))) / 255
        error = (y - plain).square().mean((0, 2, 3)).sqrt()
        assert bool((error > 0).all())
        assert bool((error < step).all())
