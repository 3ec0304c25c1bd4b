from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tcaq_lightning.artifact.freeze import freeze
from tcaq_lightning.backends.base import LayerKernel
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.backends.torchao import TorchAOLinear, TorchAOWeight, layer_kernels, map_linear_layers
from tcaq_lightning.config import ActivationConfig, QuantizationConfig, WeightConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.layers import QuantConv2d, QuantLinear
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers import CodedWeight
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups

BATCH, CHANNELS, OUTPUTS = 3, 16, 24


class Model(nn.Module):
    """Layers of all kinds in a chain; `timestep` chooses the group."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(CHANNELS, OUTPUTS)
        self.narrow = nn.Linear(OUTPUTS, 4, bias=False)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(self.narrow(self.first(x))[:, None])


@torch.no_grad()
def frozen(
    weight_bits: int = 4, activation_bits: int = 8, symmetric: bool = True, dynamic: bool = False
) -> tuple[Any, TimestepGroups]:
    torch.manual_seed(0)
    model, groups = Model(), TimestepGroups([300.0, 600.0])
    activation = ActivationConfig(activation_bits, dynamic_per_token=dynamic)
    quantize(model, QuantizationConfig(WeightConfig(weight_bits, symmetric), activation), groups)
    generator, levels = torch.Generator().manual_seed(1), 2**activation_bits - 1
    for layer in quant_layers(model).values():
        q = layer.input_quantizer
        q.delta.copy_((4 + torch.rand(3, generator=generator)) / levels)
        q.zero_point.copy_(torch.randint(levels // 3, levels // 2 + 1, (3,), generator=generator))
        q.r.copy_(0.5 + torch.rand(q.r.shape, generator=generator))
        layer.learned_weight.search(q.r)
        if q.shift is not None:
            q.shift.copy_(torch.randn(q.shift.shape, generator=generator).half() / 8)
            layer.set_shift()
        if layer.bias_shift is not None:
            layer.bias_shift.copy_(torch.randn(layer.bias_shift.shape, generator=generator).half() / 9)
    freeze(model)
    return model.requires_grad_(False).eval(), groups


def by_integers(layer: QuantLinear, x: Tensor, group: Tensor) -> Tensor:
    """What the layer is by definition, in float64 around a sum of int64: one sample and output after the other."""
    q, weight = layer.input_quantizer, layer.weight_quantizer
    assert isinstance(weight, CodedWeight)
    outputs = []
    for sample, g in zip(x, group.tolist(), strict=True):
        centred = sample if q.shift is None else sample - q.shift
        codes = torch.round(centred / (q.r * q.delta[g])) + q.zero_point[g]
        integers = (codes.clamp(0, 2**q.bits - 1) - q.zero_point[g]).long()  # (T, C)
        sums = integers @ (weight.codes.long() - weight.zero_point.long()[:, None]).T
        y = sums.double() * q.delta[g].double() * weight.scale.double()
        for term in (layer.bias, layer.shift_bias, None if layer.bias_shift is None else layer.bias_shift[g]):
            y = y if term is None else y + term.double()
        outputs.append(y)
    return torch.stack(outputs)


torchao = pytest.importorskip("torchao", reason="the extra torchao is not installed")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(2, 4), (4, 8), (6, 6), (8, 8)])
def test_a_layer_computes_the_integers_of_its_definition(
    weight_bits: int, activation_bits: int, symmetric: bool
) -> None:
    model, groups = frozen(weight_bits, activation_bits, symmetric)
    simulated = model.first
    if symmetric or weight_bits < 8:
        map_linear_layers(model)
        assert isinstance(model.first, TorchAOLinear)
    x = 2 * torch.randn(BATCH, 5, CHANNELS, generator=torch.Generator().manual_seed(2))
    for group in (torch.tensor([0, 1, 2]), torch.tensor([1])):
        groups.set(group)
        expected = by_integers(simulated, x, group.expand(BATCH))
        torch.testing.assert_close(
            model.first(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )
        torch.testing.assert_close(model.first(x), simulated(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(model.first(x), model.first.compute(model.first.input_quantizer(x)))


def test_its_product_is_torchaos(monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = frozen()
    map_linear_layers(model)
    groups.set(torch.tensor([1]))
    seen: list[tuple[torch.dtype, torch.dtype, torch.Size]] = []
    from torchao.quantization.quantize_.workflows.int8 import int8_tensor

    original = int8_tensor.int_scaled_matmul

    def watched(a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
        seen.append((a.dtype, b.dtype, a.shape))
        return original(a, b, scales)

    monkeypatch.setattr(int8_tensor, "int_scaled_matmul", watched)
    y = model.first(torch.randn(2, 5, CHANNELS))
    assert seen == [(torch.int8, torch.int8, (32, CHANNELS))]  # ten rows, padded
    assert y.shape == (2, 5, OUTPUTS)
    model.first(torch.randn(2, 40, CHANNELS))
    assert seen[1][2] == (80, CHANNELS)


def test_integers_and_scales_are_taken_as_they_are() -> None:
    for bits, symmetric in [(2, True), (4, True), (4, False), (6, True), (8, True)]:
        model, _ = frozen(bits, symmetric=symmetric)
        source = model.first.weight_quantizer
        weight = TorchAOWeight(source)
        assert type(weight.tensor).__name__ == "Int8Tensor"
        assert torch.equal(weight.integers.int(), source.codes.int() - source.zero_point.int()[:, None])
        assert torch.equal(weight.codes, source.codes)
        expected = weight.integers.float() * source.scale[:, None]
        assert torch.equal(weight.tensor.dequantize(), expected)  # torchao's own
        one = torch.ones(1)
        assert torch.equal(weight(one), source(one))
        assert torch.equal(weight(one), expected)


def test_what_is_not_mapped_says_why() -> None:
    model, _ = frozen(8, symmetric=False)
    map_linear_layers(model)
    assert layer_kernels(model) == [
        LayerKernel("first", "Linear", False, "asymmetric weights beyond int8"),
        LayerKernel("narrow", "Linear", False, "a size is not a multiple of 8"),
        LayerKernel("conv", "Conv2d", False, "a convolution"),
    ]
    model, _ = frozen(dynamic=True)
    map_linear_layers(model)
    assert layer_kernels(model)[0].reason == "steps of its input are found token by token"
    assert type(model.conv) is QuantConv2d
    model, _ = frozen()
    assert [kernel.integer for kernel in layer_kernels(model)] == [False, False, False]
    map_linear_layers(model)
    assert [kernel.integer for kernel in layer_kernels(model)] == [True, False, False]


def test_full_precision_input_while_its_quantizer_is_off() -> None:
    model, groups = frozen()
    simulated = model.first
    map_linear_layers(model)
    groups.set(torch.tensor([1]))
    x = torch.randn(2, 5, CHANNELS)
    simulated.input_quantizer.enabled = False
    assert torch.equal(model.first(x), simulated(x))


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    from tests.artifact.test_directory import BOUNDARIES, as_pipeline, calibrated, config_of, save_artifact

    pipeline = as_pipeline(calibrated(config_of(4), BOUNDARIES))
    freeze(pipeline.unet)
    save_artifact(pipeline, "unet", pipeline.unet, tmp_path / "q", {})
    return tmp_path / "q"


def test_backend_of_an_artifact(artifact: Path, tmp_path: Path) -> None:
    from tests.artifact.test_directory import SAMPLERS, mixed_prediction, samples

    simulated, loaded = load_quantized(artifact), load_quantized(artifact, device="cpu", backend="torchao")
    kernels = layer_kernels(loaded.unet)
    assert {kernel.kind for kernel in kernels if kernel.integer} == {"Linear"}
    assert sum(kernel.integer for kernel in kernels) == sum(kernel.kind == "Linear" for kernel in kernels) > 10
    expected, found = mixed_prediction(simulated.unet), mixed_prediction(loaded.unet)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert (samples(loaded, SAMPLERS[0]) - samples(simulated, SAMPLERS[0])).abs().max() < 1e-2
    loaded.to("cpu", torch.float32)
    assert torch.equal(mixed_prediction(loaded.unet), found)
    loaded.save_pretrained(tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again/unet" / name).read_bytes() == (artifact / "unet" / name).read_bytes()
    with pytest.raises(UserError, match="threads: backend 'torchao' has no such option"):
        load_quantized(artifact, backend="torchao", threads=1)
