"""An artifact whose layers have every number format that there is, with and without quantized inputs."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

from tcaq_lightning.artifact.directory import artifact_sizes, save_artifact
from tcaq_lightning.artifact.freeze import freeze
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.config import ActivationConfig, LayerRule, QuantizationConfig, WeightConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.layers import LAYERS
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers import FORMATS, SoftmaxQuantizer
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tests.tiny_models import tiny_unet

OTHERS = [("int", 4, 16), ("int", 8, "tensor"), ("e4m3", 8, "tensor")]


def formats() -> list[tuple[str, int, str | int | None]]:
    return [(name, FORMATS[name].widths[-1], None) for name in FORMATS if name != "pow2"] + OTHERS


def prediction(denoiser: nn.Module) -> Tensor:
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found: Tensor = denoiser(x, torch.tensor([3, 40, 99]), return_dict=False)[0]
    return found


@torch.no_grad()
def calibrated(activation_bits: int) -> nn.Module:
    denoiser = tiny_unet()
    names = [name for name, module in denoiser.named_modules() if type(module) in LAYERS]
    rules = [
        LayerRule(layer, weight_bits=bits, weight_format=name, weight_granularity=granularity)
        for layer, (name, bits, granularity) in zip(names, cycle(formats()), strict=False)
    ]
    config = QuantizationConfig(WeightConfig(4), ActivationConfig(activation_bits), rules=rules)
    quantize(denoiser, config, TimestepGroups([50.0]))
    for module in denoiser.modules():
        if isinstance(module, SoftmaxQuantizer):
            module.delta.fill_(1 / 255)
    for layer in quant_layers(denoiser).values():
        layer.input_quantizer.delta.fill_(0.05)
        layer.input_quantizer.zero_point.fill_(128)
        if layer.input_quantizer.r.numel() > 1:
            layer.input_quantizer.r.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
        layer.search_weight()
    return denoiser.requires_grad_(False)


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_every_format_is_stored_and_opened_with_the_same_bits(tmp_path: Path, activation_bits: int) -> None:
    denoiser = calibrated(activation_bits)
    expected = prediction(denoiser)
    freeze(denoiser)
    assert torch.equal(prediction(denoiser), expected)
    pipeline = DDIMPipeline(denoiser, DDIMScheduler())
    save_artifact(pipeline, "unet", denoiser, tmp_path, {})
    opened = load_quantized(tmp_path).unet
    used = {layer.weight_quantizer.number_format.name for layer in quant_layers(opened).values()}
    assert used == {name for name, _, _ in formats()}
    assert torch.equal(prediction(opened), expected)
    assert torch.equal(prediction(load_quantized(tmp_path, packed=False).unet), expected)
    assert torch.equal(prediction(diffusers.DiffusionPipeline.from_pretrained(str(tmp_path)).unet), expected)
    with pytest.raises(UserError, match=r"^unsupported (layer|quantizer)") as caught:
        build_graph(opened, "artifact")
    assert "\n" not in str(caught.value)


def test_files_hold_as_many_bytes_as_the_formats_say(tmp_path: Path) -> None:
    denoiser = calibrated(16)
    weights = {name: layer.learned_weight for name, layer in quant_layers(denoiser).items()}
    bits = sum(w.number_format.bits_per_weight(tuple(w.shape)) * w.weight.numel() for w in weights.values())
    layers = quant_layers(denoiser)
    plain = sum(p.numel() * 4 for n, p in denoiser.named_parameters() if not n.endswith("weight_quantizer.weight"))
    inputs = {id(layer.input_quantizer): layer.input_quantizer for layer in layers.values()}
    plain += sum(4 * quantizer.r.numel() for quantizer in inputs.values() if quantizer.reparameterized)
    plain += sum(2 * layer.bias_shift.numel() for layer in layers.values() if layer.bias_shift is not None)
    freeze(denoiser)
    save_artifact(DDIMPipeline(denoiser, DDIMScheduler()), "unet", denoiser, tmp_path, {})
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == pytest.approx(bits / 8 + plain, abs=len(weights))
    assert artifact_sizes(tmp_path)
