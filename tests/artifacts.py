"""Artifacts of tiny denoisers, without a calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

from tcaq_lightning.artifact.directory import freeze, save_artifact
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.config import LayerRule, QuantizationConfig, WeightConfig
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers import SoftmaxQuantizer
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


@torch.no_grad()
def frozen(denoiser: nn.Module, bits: int = 4, rules: list[LayerRule] | None = None) -> Any:
    """Quantized in place, with tables that differ by group and channel."""
    quantize(denoiser, QuantizationConfig(WeightConfig(bits), rules=rules or []), TimestepGroups([300.0, 600.0]))
    generator = torch.Generator().manual_seed(1)
    for q in quantizers(denoiser).values():
        levels = 2**q.bits - 1
        if isinstance(q, SoftmaxQuantizer):
            q.delta.copy_((0.5 + torch.rand(q.delta.shape, generator=generator)) / levels)
            continue
        q.delta.copy_((6 + torch.rand(q.delta.shape, generator=generator)) / levels)
        q.zero_point.copy_(torch.randint(levels // 3, levels // 2 + 1, q.zero_point.shape, generator=generator))
        q.r.copy_(0.5 + torch.rand(q.r.shape, generator=generator))
    for layer in quant_layers(denoiser).values():
        layer.learned_weight.search(layer.input_quantizer.r)
    freeze(denoiser)
    return denoiser.requires_grad_(False).eval()


OPENERS: dict[str, Callable[[Path, type], Any]] = {
    "load_quantized": lambda path, _: load_quantized(path).unet,
    "from_pretrained": lambda path, kind: kind.from_pretrained(path / "unet"),
}
"""Both ways to open the denoiser of an artifact, by name: (artifact's directory, class of the denoiser)."""


def save_denoiser(denoiser: nn.Module, path: Path, **options: Any) -> None:
    """Write the artifact of any denoiser, in the place of the UNet of the simplest pipeline."""
    pipeline = DDIMPipeline(frozen(denoiser, **options), DDIMScheduler())
    save_artifact(pipeline, "unet", pipeline.unet, path, {})
