"""A tiny denoiser of every family, with the arguments that it is called with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from tcaq_lightning.calibration.storage import ActivationStorage
from tcaq_lightning.calibration.streams import Streams
from tcaq_lightning.calibration.unit_data import Arguments
from tcaq_lightning.config import ActivationConfig, QuantizationConfig, WeightConfig
from tcaq_lightning.models.denoiser_calls import Conditioning, Samples, split_call
from tcaq_lightning.models.graph import UnitGraph, trace_units
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups

SAMPLES = 7
W4A8 = QuantizationConfig(weight=WeightConfig(bits=4), activation=ActivationConfig(bits=8))


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _unet(**options: Any) -> Any:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**settings | options)


def _ddpm() -> Any:
    return UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )


def _sdxl() -> Any:
    return _unet(
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )


def _added_kv(only_cross_attention: bool = False) -> Any:
    return _unet(
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_only_cross_attention=only_cross_attention,
    )


def _dit() -> Any:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=8, num_embeds_ada_norm=10
    )


def _pixart(additional: bool = False) -> Any:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=10,
        sample_size=8,
        use_additional_conditions=additional,
    )


def _sd3(**options: Any) -> Any:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**settings | options)


def _flux(guidance: bool = True) -> Any:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).repeat(4, 1)[:SAMPLES]


def _call(model: Any, x: Tensor, t: Tensor, part: slice) -> Arguments:
    """All arguments of a call on a part of the samples."""
    text, pooled = _normal(SAMPLES, 5, 12, seed=1)[part], _normal(SAMPLES, 10, seed=2)[part]
    keywords: dict[str, Any] = {"return_dict": False}
    if isinstance(model, UNet2DModel):
        return (x, t), keywords
    if isinstance(model, UNet2DConditionModel):
        if model.config.addition_embed_type == "text_time":
            keywords["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.arange(6.0).expand(len(x), 6)}
        elif "CrossAttnDownBlock2D" in model.config.down_block_types:
            keywords["encoder_attention_mask"] = MASK[part].bool()
        return (x, t), keywords | {"encoder_hidden_states": text}
    if isinstance(model, DiTTransformer2DModel):
        return (x, t), keywords | {"class_labels": torch.arange(SAMPLES)[part]}
    if isinstance(model, PixArtTransformer2DModel):
        sizes = torch.tensor([[512.0, 640.0]]) + torch.arange(SAMPLES)[:, None]
        keywords["added_cond_kwargs"] = {"resolution": sizes[part], "aspect_ratio": (sizes[part, :1] / 600)}
        if not model.config.use_additional_conditions:
            keywords["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        return (x,), keywords | {
            "encoder_hidden_states": text[..., :10],
            "timestep": t,
            "encoder_attention_mask": MASK[part],
        }
    if isinstance(model, SD3Transformer2DModel):
        return (), keywords | {
            "hidden_states": x,
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": t,
        }
    assert isinstance(model, FluxTransformer2DModel)
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    positions = torch.stack([torch.zeros(12), rows.flatten(), columns.flatten()], dim=1)
    guidance = torch.full((len(x),), 3.5) if model.config.guidance_embeds else None
    return (), keywords | {
        "hidden_states": x.flatten(2).transpose(1, 2)[:, :12],
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": t,
        "img_ids": positions,
        "txt_ids": torch.zeros(5, 3),
        "guidance": guidance,
    }


FAMILIES: dict[str, Callable[[], Any]] = {
    "UNet2DModel": _ddpm,
    "Stable Diffusion 1": _unet,
    "SDXL": _sdxl,
    "added_kv": _added_kv,
    "added_kv, only cross": lambda: _added_kv(only_cross_attention=True),
    "DiT": _dit,
    "PixArt": _pixart,
    "PixArt, sizes": lambda: _pixart(additional=True),
    "SD3": _sd3,
    "SD3.5": lambda: _sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "Flux": _flux,
    "Flux, no guidance": lambda: _flux(guidance=False),
}
"""Constructors by name."""


@dataclass
class Family:
    """A denoiser, its quantized twin, and calibration samples for both."""

    full: Any
    quantized: Any
    graph: UnitGraph
    timestep_groups: TimestepGroups
    rows: list[Any]
    x: Tensor
    timesteps: Tensor

    def arguments(self, part: slice) -> Arguments:
        """A denoiser's full call on some of the samples, in the denoiser's type."""
        args, kwargs = _call(self.full, self.x[part], self.timesteps[part], part)
        return _in_type(args, self.full.dtype), _in_type(kwargs, self.full.dtype)

    def predict(self, denoiser: Any, part: slice = slice(0, SAMPLES)) -> Tensor:
        """A denoiser's prediction."""
        args, kwargs = self.arguments(part)
        with torch.no_grad():
            prediction: Tensor = denoiser(*args, **kwargs)[0]
        return prediction

    def streams(self, batch_size: int = 3) -> Streams:
        storage = ActivationStorage({"device": 0, "host": 1e9, "disk": 0}, torch.device("cpu"), Path())
        call = split_call(self.full, *self.arguments(slice(0, SAMPLES)))
        samples = Samples(call.x, call.timestep, Conditioning.of_call(call.arguments, SAMPLES))
        return Streams(self.full, self.quantized, self.graph, self.timestep_groups, samples, batch_size, storage)


def _in_type(values: Any, dtype: torch.dtype) -> Any:
    kept = ("timestep", "img_ids", "txt_ids", "guidance")
    if isinstance(values, dict):
        return {k: v if k in kept else _in_type(v, dtype) for k, v in values.items()}
    if isinstance(values, tuple):
        return tuple(_in_type(v, dtype) for v in values)
    return values.to(dtype) if isinstance(values, Tensor) and values.is_floating_point() else values


def make_denoiser(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A deterministic denoiser with no trivial parameters: gates and output layers are zero at first."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser: nn.Module = FAMILIES[name]()
        for p in denoiser.parameters():
            p.data += 0.1 * torch.randn_like(p)
    denoiser.requires_grad_(False).eval()
    return denoiser if dtype is torch.float32 else denoiser.to(dtype)


def make_family(
    name: str,
    config: QuantizationConfig = W4A8,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[Any], Any] = bool,
) -> Family:
    """A denoiser and its quantized twin, its quantizers neutral; `prepare` changes both first."""
    full = make_denoiser(name, dtype)
    prepare(full)
    unit = 1000 if isinstance(full, FluxTransformer2DModel) else 1  # it is called with t / 1000
    quantized, timestep_groups = copy.deepcopy(full), TimestepGroups([500.0 / unit])
    rows = quantize(quantized, config, timestep_groups)
    x = _normal(SAMPLES, 4, 8, 8, seed=3).to(dtype)
    timesteps = torch.tensor([0, 999, 600, 40, 480, 520, 700])
    timesteps = timesteps / unit if unit > 1 else timesteps
    family = Family(full, quantized, UnitGraph([], {}, {}), timestep_groups, rows, x, timesteps)
    family.graph = trace_units(full, lambda: family.predict(full, slice(0, 2)))
    return family
