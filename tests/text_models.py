"""Text-to-image pipelines of toy size, with tokenizers that need no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
TOKENS, WIDTH = 16, 16


def clip_tokenizer(directory: Path) -> Any:
    """A CLIP tokenizer that knows single characters."""
    from transformers import CLIPTokenizer

    characters = [chr(code) for code in range(33, 127)]
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=TOKENS)


def clip(tokenizer: Any, projection: bool = False, width: int = WIDTH) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(settings)


def word_tokenizer() -> Any:
    """A tokenizer of a few words, in the place of T5's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "red", "boot", "bag"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=TOKENS, **special)


def t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=10, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


def autoencoder(**changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        3,
        3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        **changes,
    )


def unet(context: int, **changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=context,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **changes,
    )


def _nontrivial(module: nn.Module) -> Any:
    """Without the zeros that gates and output layers begin with."""
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module


def _stable_diffusion(tokenizer: Any) -> Any:
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    parts = autoencoder(), clip(tokenizer), tokenizer, unet(WIDTH), scheduler
    return StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


def _sdxl(tokenizer: Any) -> Any:
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": WIDTH + 6 * 8}
    denoiser = unet(2 * WIDTH, addition_embed_type="text_time", use_linear_projection=True, **sizes)
    encoders = clip(tokenizer), clip(tokenizer, projection=True), tokenizer, tokenizer
    return StableDiffusionXLPipeline(
        autoencoder(), *encoders, denoiser, EulerDiscreteScheduler(), add_watermarker=False
    )


def _sd3(tokenizer: Any) -> Any:
    sizes = {"joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 2 * WIDTH}
    transformer = SD3Transformer2DModel(**HEADS, num_layers=2, sample_size=8, in_channels=4, out_channels=4, **sizes)
    scheduler, vae = FlowMatchEulerDiscreteScheduler(), autoencoder(shift_factor=0.1, scaling_factor=1.0)
    first, second = clip(tokenizer, projection=True), clip(tokenizer, projection=True)
    texts = first, tokenizer, second, tokenizer, t5(32), word_tokenizer()
    return StableDiffusion3Pipeline(_nontrivial(transformer), scheduler, vae, *texts)


def _flux(tokenizer: Any) -> Any:
    sizes = {"in_channels": 16, "joint_attention_dim": 12, "pooled_projection_dim": WIDTH, "axes_dims_rope": (2, 2, 4)}
    transformer = FluxTransformer2DModel(**HEADS, num_layers=1, num_single_layers=1, guidance_embeds=True, **sizes)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = autoencoder(shift_factor=0.1, scaling_factor=1.0)
    texts = clip(tokenizer), tokenizer, t5(12), word_tokenizer()
    return FluxPipeline(scheduler, vae, *texts, _nontrivial(transformer))


def _pixart(_: Any) -> Any:
    sizes = {"in_channels": 4, "out_channels": 8, "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 12}
    transformer = _nontrivial(PixArtTransformer2DModel(**HEADS, num_layers=2, **sizes))
    return PixArtAlphaPipeline(word_tokenizer(), t5(12), autoencoder(), transformer, DPMSolverMultistepScheduler())


TEXT_MODELS = {
    "Stable Diffusion": _stable_diffusion,
    "SDXL": _sdxl,
    "SD3": _sd3,
    "Flux": _flux,
    "PixArt": _pixart,
}
SIZE = {"height": 16, "width": 16}
CALL_OPTIONS: dict[str, dict[str, Any]] = {
    "SDXL": SIZE,
    "SD3": SIZE | {"max_sequence_length": TOKENS},
    "Flux": SIZE | {"max_sequence_length": TOKENS},
    "PixArt": SIZE | {"max_sequence_length": TOKENS, "use_resolution_binning": False},
}
"""Arguments of the pipeline's call that the toy size needs."""


def make_text_model(name: str, directory: Path) -> Any:
    """One of `TEXT_MODELS`; its tokenizer's files lie in `directory`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = TEXT_MODELS[name](clip_tokenizer(directory))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
