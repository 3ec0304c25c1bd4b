from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

from tcaq_lightning.artifact.directory import freeze, save_artifact
from tcaq_lightning.config import LayerRule, QuantizationConfig, WeightConfig
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers import SoftmaxQuantizer
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tests.tiny_models import seven_units, tiny_unet

BOUNDARIES = [30.0, 60.0]


@torch.no_grad()
def set_parameters(denoiser: nn.Module, softmax: str = "uniform") -> None:
    """What a calibration would set, at random: every table differs by group, r by channel."""
    generator = torch.Generator().manual_seed(1)
    for q in quantizers(denoiser).values():
        levels = 2**q.bits - 1
        if isinstance(q, SoftmaxQuantizer):
            kinds = {"uniform": torch.zeros_like(q.tau), "log": torch.ones_like(q.tau)}
            mixed = (torch.arange(len(q.tau)) % 2).float()
            q.tau.copy_(kinds.get(softmax, mixed) * 12 / 37)
            q.delta.copy_(torch.where(q.tau > 0, 1.0, (0.5 + torch.rand(q.tau.shape, generator=generator)) / levels))
            continue
        q.delta.copy_((4 + torch.rand(q.delta.shape, generator=generator)) / levels)
        q.zero_point.copy_(torch.randint(levels // 3, levels // 2 + 1, q.zero_point.shape, generator=generator))
        if q.constant_zero:
            q.zero_point.fill_(float(q.zero_point[0]))
        if q.r.numel() > 1:
            q.r.copy_(0.5 + torch.rand(q.r.shape, generator=generator))
    for layer in quant_layers(denoiser).values():
        layer.learned_weight.search(layer.input_quantizer.r)
        if layer.input_quantizer.shift is not None:
            shift = torch.randn(layer.input_quantizer.shift.shape, generator=generator).half() / 8
            layer.input_quantizer.shift.copy_(shift)
            layer.set_shift()
        if layer.bias_shift is not None:
            layer.bias_shift.copy_((torch.randn(layer.bias_shift.shape, generator=generator) / 50).half())


@torch.no_grad()
def set_outputs(denoiser: nn.Module, *args: Any) -> None:
    """Ranges of the quantized outputs, in order, from what the layers get in a call."""

    def search(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        layer.search_output(layer.input_quantizer(inputs[0]))

    handles = [layer.register_forward_pre_hook(search) for layer in quant_layers(denoiser).values()]
    denoiser(*args)
    for handle in handles:
        handle.remove()


def _frozen(
    bits: int = 4,
    boundaries: list[float] = BOUNDARIES,
    softmax: str = "uniform",
    symmetric: bool = True,
    rules: list[LayerRule] | None = None,
    integer_ready: bool = False,
    levels: int = 1,
) -> Any:
    denoiser: Any = (seven_units() if levels == 1 else tiny_unet()).eval()
    config = QuantizationConfig(WeightConfig(bits, symmetric), rules=rules or [], integer_ready=integer_ready)
    quantize(denoiser, config, TimestepGroups(boundaries))
    set_parameters(denoiser, softmax)
    if integer_ready:
        x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        set_outputs(denoiser, x, torch.linspace(0, 99, 8))
    freeze(denoiser)
    return denoiser.requires_grad_(False)


@pytest.fixture(scope="session")
def frozen() -> Callable[..., Any]:
    """Builds frozen denoisers: (weight bits, boundaries, kinds of softmax, symmetric, rules, output codes, levels).

    The time that a graph takes grows with its layers: two levels, with resampling, are for the tests that need them.
    """
    made: dict[str, Any] = {}  # equal calls share one

    def make(**case: Any) -> Any:
        if repr(case) not in made:
            made[repr(case)] = _frozen(**case)
        return made[repr(case)]

    return make


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artifact at W4A8."""
    path = tmp_path_factory.mktemp("artifact") / "quantized"
    denoiser = _frozen()
    save_artifact(DDIMPipeline(denoiser, DDIMScheduler(num_train_timesteps=100)), "unet", denoiser, path, {})
    return path
