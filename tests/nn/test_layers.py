from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from tcaq_lightning.config import QuantizationConfig
from tcaq_lightning.nn.attention import QuantAttnProcessor, shares_input_quantizer
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups

CONVOLUTIONS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": (1, 0)},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "reflect", "bias": False},
}


class Holder(nn.Module):
    """A denoiser of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Any, timestep: Any, **kwargs: Any) -> Any:
        return self.layer(sample, **kwargs)


def quantized(layer: nn.Module) -> tuple[Holder, TimestepGroups]:
    groups = TimestepGroups([500.0])
    holder = Holder(layer).requires_grad_(False).eval()
    quantize(holder, QuantizationConfig(), groups)
    return holder, groups


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolution_without_quantization_is_the_original(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **options)
    x = torch.randn(2, 4, 8, 8)
    expected = conv(x)
    holder, _ = quantized(conv)
    with full_precision(holder):
        assert torch.equal(holder(x, 0), expected)


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2)])
def test_output_is_that_of_quantized_operands(layer: nn.Module) -> None:
    torch.manual_seed(0)
    holder, _ = quantized(layer)
    quant = holder.layer
    assert isinstance(quant, QuantLayer)
    quant.input_quantizer.r.copy_(torch.rand(4) + 0.5)
    quant.input_quantizer.delta.copy_(torch.tensor([0.1, 0.2]))
    quant.input_quantizer.zero_point.fill_(100)
    quant.learned_weight.search(quant.input_quantizer.r)
    x = torch.randn(3, 5, 4) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 6, 6)
    got = holder(x, torch.tensor([0, 600, 0]))
    layer.weight.data = quant.weight_quantizer(quant.input_quantizer.r)  # type: ignore[union-attr]
    for i, group in enumerate((0, 1, 0)):
        with quant.input_quantizer.groups.using(torch.tensor([group])):
            expected = layer(quant.input_quantizer(x[i : i + 1]))
        torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 3, padding=1)])
def test_bias_shift_goes_to_each_samples_group(layer: nn.Module) -> None:
    holder, _ = quantized(layer)
    x = torch.randn(3, 5, 4) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 6, 6)
    timesteps = torch.tensor([0, 600, 999])
    before = holder(x, timesteps)
    shift = torch.randn(2, 6)
    holder.layer.bias_shift.copy_(shift)  # type: ignore[union-attr, operator]
    expected = shift[[0, 1, 1]].view((3, 1, 6) if isinstance(layer, nn.Linear) else (3, 6, 1, 1))
    torch.testing.assert_close(holder(x, timesteps) - before, expected.expand_as(before), rtol=1e-4, atol=1e-5)


POINTWISE: dict[str, tuple[nn.Module, bool]] = {
    "linear": (nn.Linear(4, 6, bias=False), True),
    "1 x 1": (nn.Conv2d(4, 6, 1), True),
    "1 x 1, stride, grouped": (nn.Conv2d(4, 6, 1, stride=2, groups=2), True),
    "1 x 1, padded": (nn.Conv2d(4, 6, 1, padding=1), False),
    "3 x 3": (nn.Conv2d(4, 6, 3), False),
}


@pytest.mark.parametrize(("layer", "pointwise"), POINTWISE.values(), ids=POINTWISE.keys())
def test_shifting_the_input_of_a_pointwise_layer_is_exact(layer: nn.Module, pointwise: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 6, 6)
    expected = layer(x)
    holder, _ = quantized(layer)
    quant = holder.layer
    assert isinstance(quant, QuantLayer)
    assert type(quant).is_pointwise(layer) == pointwise
    assert (quant.input_quantizer.shift is not None) == (quant.shift_bias is not None) == pointwise
    if quant.input_quantizer.shift is not None:
        quant.input_quantizer.shift.copy_(torch.randn(4) * 3)
        quant.set_shift()
        assert quant.shift_bias is not None
        assert quant.shift_bias.abs().min() > 0
    with full_precision(holder):
        torch.testing.assert_close(holder(x, 0), expected, rtol=1e-5, atol=1e-5)
        before = holder(x, 0)
        quant.fold_shift()
        assert quant.shift_bias is None
        assert torch.equal(holder(x, 0), before)


def test_a_shift_is_allowed_only_where_all_readers_are_pointwise() -> None:
    attention = Attention(query_dim=8, heads=2, dim_head=4)
    holder, _ = quantized(attention)
    for layer in quant_layers(holder).values():
        assert layer.input_quantizer.shift is not None
        assert layer.shift_bias is not None
    shift = attention.to_q.input_quantizer.shift
    assert attention.to_v.input_quantizer.shift is shift
    assert all(
        q.shift is None for n, q in quantizers(attention).items() if n.startswith("processor.") and hasattr(q, "r")
    )


ATTENTIONS: dict[str, dict[str, Any]] = {
    "one head": {"heads": 1, "dim_head": 8},
    "several heads": {"heads": 4, "dim_head": 2},
    "block of a UNet": {
        "heads": 2,
        "dim_head": 4,
        "norm_num_groups": 4,
        "residual_connection": True,
        "rescale_output_factor": 1.5,
        "bias": True,
        "spatial": True,
    },
    "cross": {"heads": 2, "dim_head": 4, "cross_attention_dim": 6},
    "cross with norm": {"heads": 2, "dim_head": 4, "cross_attention_dim": 6, "cross_attention_norm": "layer_norm"},
    "inner width": {"heads": 2, "dim_head": 3, "bias": True, "out_bias": False},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_attention_without_quantization_is_diffusers_own(options: dict[str, Any], masked: bool) -> None:
    torch.manual_seed(0)
    options = dict(options)
    spatial = options.pop("spatial", False)
    attention = Attention(query_dim=8, **options).eval()
    x = torch.randn(3, 8, 4, 4) if spatial else torch.randn(3, 16, 8)
    arguments: dict[str, Any] = {}
    keys = 16
    if "cross_attention_dim" in options:
        keys = 5
        arguments["encoder_hidden_states"] = torch.randn(3, keys, 6)
    if masked:
        mask = torch.zeros(3, 1, keys)
        mask[:, :, -2:] = -1e4
        arguments["attention_mask"] = mask
    expected = attention(x, **arguments)
    holder, _ = quantized(attention)
    assert isinstance(attention.processor, QuantAttnProcessor)
    shared = shares_input_quantizer([attention.to_q, attention.to_k, attention.to_v])
    assert shared == ("cross_attention_dim" not in options)
    with full_precision(holder):
        torch.testing.assert_close(holder(x, 0, **arguments), expected, rtol=1e-5, atol=1e-5)


def test_attention_quantizes_every_operand() -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=8, heads=2, dim_head=4)
    holder, _ = quantized(attention)
    names = {"processor.query", "processor.key", "processor.value", "processor.probabilities"}
    names |= {"to_q.input_quantizer", "to_out.0.input_quantizer"}  # k and v share q's
    assert set(quantizers(attention)) == names
    for layer in quant_layers(holder).values():
        layer.learned_weight.search(layer.input_quantizer.r)
    for quantizer in quantizers(attention).values():
        quantizer.delta.fill_(0.02)
        if hasattr(quantizer, "zero_point"):
            quantizer.zero_point.fill_(128)
    calls: dict[str, int] = dict.fromkeys(names, 0)

    def count(name: str) -> Any:
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    for name, quantizer in quantizers(attention).items():
        quantizer.register_forward_hook(count(name))
    x = torch.randn(2, 5, 8)
    before = holder(x, 0)
    assert calls == dict.fromkeys(names, 1)
    for quantizer in quantizers(attention).values():
        old = quantizer.delta.clone()
        quantizer.delta.mul_(3)
        assert not torch.equal(holder(x, 0), before)
        quantizer.delta.copy_(old)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_single_row_stands_for_all_samples(enabled: bool) -> None:
    torch.manual_seed(0)
    holder, groups = quantized(nn.Linear(4, 6))
    layer = holder.layer
    assert isinstance(layer, QuantLayer)
    layer.allow_bias_shift()
    assert layer.bias_shift is not None
    layer.bias_shift.normal_()
    layer.input_quantizer.delta.copy_(torch.tensor([0.1, 0.3]))
    layer.input_quantizer.enabled = enabled
    groups.set(torch.tensor([0, 1]))
    row = torch.randn(1, 4)
    assert torch.equal(layer(row), layer(row.expand(2, 4)))
