from __future__ import annotations

from typing import Any

import pytest
import torch

from tcaq_lightning.config import QuantizationConfig
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.state import full_precision, quantization_state, restore_quantization_state, settle
from tcaq_lightning.quantizers import Rounding


@pytest.mark.parametrize("integer_ready", [False, True])
def test_quantized_unet_switched_to_full_precision_is_the_original(make_twins: Any, integer_ready: bool) -> None:
    twins = make_twins(QuantizationConfig(integer_ready=integer_ready))
    with full_precision(twins.quantized):
        got = twins.quantized(twins.x, twins.timesteps).sample
    torch.testing.assert_close(got, twins.full(twins.x, twins.timesteps).sample, rtol=1e-4, atol=1e-5)
    assert all(q.enabled for q in quantizers(twins.quantized).values())
    assert all(layer.learned_weight.rounding is Rounding.HARD for layer in quant_layers(twins.quantized).values())


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


def test_settled_layers_compute_the_same_and_are_restored_with_their_logits(make_twins: Any, initialized: Any) -> None:
    twins = make_twins()
    unit, data, _ = initialized(twins, "mid_block.attentions.0")

    def output() -> torch.Tensor:
        with torch.no_grad():
            return data.run(unit, twins.timestep_groups, torch.arange(len(data)), torch.device("cpu"))

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
