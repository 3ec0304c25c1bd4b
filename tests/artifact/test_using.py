"""What docs/using.md says about the pipeline of an artifact, row by row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
)
from PIL import Image

from tcaq_lightning.artifact.directory import save_artifact
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.attention import keep_quantized
from tests.artifacts import frozen
from tests.families import make_denoiser, make_family
from tests.text_models import make_text_model

pytest.importorskip("transformers")

CPU = torch.device("cpu")
PICTURE = Image.new("RGB", (16, 16), (200, 90, 9))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a Stable Diffusion pipeline of toy size."""
    root = tmp_path_factory.mktemp("using")
    pipeline = make_text_model("Stable Diffusion", root)
    save_artifact(pipeline, "unet", frozen(pipeline.unet), root / "artifact", {})
    return root / "artifact"


@pytest.fixture(scope="module")
def expected(artifact: Path) -> Any:
    """Its image of a seed."""
    return image(load_quantized(artifact))


def image(pipeline: Any, **arguments: Any) -> Any:
    """The pipeline's image of a seed."""
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a boot", **call | arguments).images[0]


def parts(pipeline: Any) -> dict[str, Any]:
    return {k: v for k, v in pipeline.components.items() if k != "image_encoder"}


SAME: dict[str, Callable[[Any], Any]] = {
    "attention slicing": lambda p: p.enable_attention_slicing(1),
    "attention slicing undone": lambda p: (p.enable_attention_slicing("max"), p.disable_attention_slicing()),
    "xformers": lambda p: p.unet.set_use_memory_efficient_attention_xformers(True),
    "xformers undone": lambda p: p.disable_xformers_memory_efficient_attention(),
    "default processors": lambda p: p.unet.set_default_attn_processor(),
    "fused projections": lambda p: p.fuse_qkv_projections(vae=False),
    "fused projections undone": lambda p: (p.fuse_qkv_projections(vae=False), p.unfuse_qkv_projections(vae=False)),
    "attention backend": lambda p: p.unet.set_attention_backend("native"),
    "its own processors": lambda p: p.unet.set_attn_processor(p.unet.attn_processors),
    "VAE in slices": lambda p: p.vae.enable_slicing(),
    "channels last": lambda p: p.unet.to(memory_format=torch.channels_last),
    "layerwise casting": lambda p: p.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "gradient checkpointing": lambda p: p.unet.enable_gradient_checkpointing(),
    "groups offloaded": lambda p: p.enable_group_offload(CPU, CPU, "leaf_level"),
    "FreeU undone": lambda p: (p.enable_freeu(0.9, 0.2, 1.2, 1.4), p.disable_freeu()),
}


@pytest.mark.parametrize("setting", SAME)
def test_settings_that_change_nothing(artifact: Path, expected: Any, setting: str) -> None:
    pipeline = load_quantized(artifact)
    SAME[setting](pipeline)
    np.testing.assert_allclose(image(pipeline), expected, rtol=0, atol=1e-5 if setting == "channels last" else 0)


WORKS: dict[str, Callable[[Any], Any]] = {
    "FreeU": lambda p: (p.enable_freeu(0.9, 0.2, 1.2, 1.4), image(p))[1],
    "another scheduler": lambda p: (setattr(p, "scheduler", DDIMScheduler()), image(p))[1],
    "more steps": lambda p: image(p, num_inference_steps=4),
    "other type": lambda p: image(p.to(torch.bfloat16)),
    "image to image": lambda p: image(AutoPipelineForImage2Image.from_pipe(p), image=PICTURE, strength=1.0),
    "inpainting": lambda p: image(
        AutoPipelineForInpainting.from_pipe(p), image=PICTURE, mask_image=PICTURE.convert("L"), height=16, width=16
    ),
    "ControlNet": lambda p: image(controlled(p), image=PICTURE),
}


def controlled(pipeline: Any) -> Any:
    """With a full-precision ControlNet beside the quantized UNet."""
    torch.manual_seed(0)
    channels = {"conditioning_embedding_out_channels": (8, 16)}
    control = ControlNetModel.from_unet(pipeline.unet, **channels, load_weights_from_unet=False)
    for p in control.parameters():  # its outputs are zero at first
        p.data += 0.1 * torch.randn_like(p)
    return StableDiffusionControlNetPipeline(**pipeline.components, controlnet=control, requires_safety_checker=False)


@pytest.mark.parametrize("use", WORKS)
def test_uses_that_work(artifact: Path, expected: Any, use: str) -> None:
    got = WORKS[use](load_quantized(artifact))
    assert np.isfinite(got).all()
    assert got.shape == expected.shape
    assert abs(got - expected).max() > 1e-4


def test_features_of_a_t2i_adapter_are_added(artifact: Path) -> None:
    unet: Any = load_quantized(artifact).unet
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, unet.config.cross_attention_dim)
    features = [torch.ones(2, channels, 4, 4) for channels in unet.config.block_out_channels]

    def predict(factor: float) -> torch.Tensor:
        added = [factor * feature for feature in features]
        prediction: torch.Tensor = unet(x, 500, context, down_intrablock_additional_residuals=added).sample
        return prediction

    plain = unet(x, 500, context).sample
    assert torch.equal(predict(0.0), plain)
    assert not torch.equal(predict(0.5), plain)


def test_feed_forward_layers_in_chunks_of_tokens_not_of_samples() -> None:
    family = make_family("SD3")
    denoiser = frozen(make_denoiser("SD3"))
    keep_quantized(denoiser)
    expected = family.predict(denoiser)
    denoiser.enable_forward_chunking(1, dim=1)
    torch.testing.assert_close(family.predict(denoiser), expected)
    with pytest.raises(UserError, match="enable_forward_chunking: expected dim=1"):
        denoiser.enable_forward_chunking(1)


CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.5),
    "Pyramid Attention Broadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_caches_of_blocks_and_attentions(cache: str) -> None:
    family = make_family("Flux")
    denoiser = frozen(make_denoiser("Flux"))
    expected = family.predict(denoiser)
    denoiser.enable_cache(CACHES[cache]())
    with denoiser.cache_context("cond"):
        first, second = family.predict(denoiser), family.predict(denoiser)
    assert torch.equal(first, expected)
    torch.testing.assert_close(second, expected)
    denoiser.disable_cache()
    assert torch.equal(family.predict(denoiser), expected)


def sag(pipeline: Any) -> Any:
    return StableDiffusionSAGPipeline(**parts(pipeline), requires_safety_checker=False)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "PAG": lambda p: image(AutoPipelineForText2Image.from_pipe(p, enable_pag=True), pag_scale=2.0),
    "SAG": lambda p: image(sag(p)),
    "IP-Adapter": lambda p: p.unet._load_ip_adapter_weights([{}]),
    "fused LoRA": lambda p: p.fuse_lora(),
    "saving in another type": lambda p: p.unet.to(torch.bfloat16).save_pretrained("never"),
}


@pytest.mark.parametrize("use", REFUSED)
def test_uses_that_are_refused_in_one_line(artifact: Path, expected: Any, use: str) -> None:
    pipeline = load_quantized(artifact)
    with pytest.raises(UserError) as caught:
        REFUSED[use](pipeline)
    assert "\n" not in str(caught.value)
    if use != "saving in another type":
        assert (image(pipeline) == expected).all()


def test_copies_and_both_ways_to_open_give_the_same(artifact: Path, expected: Any, tmp_path: Path) -> None:
    pipeline: Any = load_quantized(artifact)
    pipeline.enable_attention_slicing(1)
    assert (image(copy.deepcopy(pipeline)) == expected).all()
    pipeline.save_pretrained(tmp_path / "again")
    opened: Any = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(opened) is StableDiffusionPipeline
    opened.disable_xformers_memory_efficient_attention()
    assert (image(opened) == expected).all()


@pytest.mark.parametrize(
    "name", ["Stable Diffusion", "Flux", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SDXL", "SD3"))]
)
def test_adapters_of_every_loader(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pipeline = make_text_model(name, tmp_path)
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    denoiser = getattr(pipeline, component)
    plain = copy.deepcopy(denoiser)
    denoiser.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(denoiser)
    type(pipeline).save_lora_weights(tmp_path / "lora", **{f"{component}_lora_layers": layers})
    setattr(pipeline, component, plain)
    save_artifact(pipeline, component, frozen(plain), tmp_path / "a", {})
    opened: Any = load_quantized(tmp_path / "a")
    unadapted = {n: t.clone() for n, t in getattr(opened, component).state_dict().items()}
    opened.load_lora_weights(tmp_path / "lora", adapter_name="one")
    opened.load_lora_weights(tmp_path / "lora", adapter_name="two")
    opened.set_adapters(["one", "two"], [0.5, 0.25])
    loaded = peft.get_peft_model_state_dict(getattr(opened, component), adapter_name="two")
    assert loaded.keys() == layers.keys()
    assert all(torch.equal(loaded[n], layers[n]) for n in layers)
    with pytest.raises(UserError, match="fuse_lora: an artifact's weights are integers"):
        opened.fuse_lora()
    opened.unload_lora_weights()
    left = getattr(opened, component).state_dict()
    assert left.keys() == unadapted.keys()
    assert all(torch.equal(left[n], unadapted[n]) for n in left)
