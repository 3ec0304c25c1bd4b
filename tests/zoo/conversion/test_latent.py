"""CompVis' networks converted: denoisers, first stages and embedder give equal outputs; nothing is left out unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.zoo.conversion import latent, latent_config
from tcaq_lightning.zoo.conversion.architecture import Component, load_exactly
from tcaq_lightning.zoo.conversion.convert import assemble
from tests.zoo.conversion.originals import (
    KLFirstStage,
    LatentDiffusion,
    LatentUNet,
    VQFirstStage,
    randomized,
    relative_error,
)
from tests.zoo.conversion.published import (
    BEDROOMS,
    CHURCHES,
    FIRST,
    IMAGENET,
    KL_F8,
    KL_SMALL,
    SMALL_LATENT,
    STABLE_DIFFUSION,
    UNET,
    VQ_F4,
    VQ_SMALL,
    changed,
    small,
)

TIMESTEPS = torch.tensor([0, 1, 500, 999])


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def unet_params(config: dict[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = config["model"]["params"]["unet_config"]["params"]
    return params


def unet_error(config: dict[str, Any]) -> tuple[float, Component]:
    params = unet_params(config)
    original = randomized(LatentUNet(params))
    component = latent_config.architecture(config)["unet"]
    unet: Any = load_exactly(component.build(), latent.convert_unet(original.state_dict(), component), "unet")
    size = min(params["image_size"], 32)
    x = noise(len(TIMESTEPS), params["in_channels"], size, size)
    if "context_dim" not in params:
        return relative_error(unet(x, TIMESTEPS).sample, original(x, TIMESTEPS)), component
    context = noise(len(TIMESTEPS), 5, params["context_dim"])
    got = unet(x, TIMESTEPS, encoder_hidden_states=context).sample
    return relative_error(got, original(x, TIMESTEPS, context)), component


SMALL_STABLE = small(STABLE_DIFFUSION, KL_SMALL, channel_mult=[1, 2], attention_resolutions=[1], context_dim=24)
VARIANTS = {
    **{k: (v, {}) for k, v in SMALL_LATENT.items()},
    "stable diffusion": (SMALL_STABLE, {}),
    "one block a level": (SMALL_LATENT["bedrooms"], {"num_res_blocks": 1}),
    "heads of fixed number, equal widths": (
        SMALL_LATENT["churches"],
        {"channel_mult": [1, 1], "resblock_updown": False, "use_scale_shift_norm": False},
    ),
    "one head": (SMALL_LATENT["bedrooms"], {"num_head_channels": None, "num_heads": 1}),
    "scale and shift alone": (SMALL_LATENT["bedrooms"], {"use_scale_shift_norm": True}),
    "residual resampling alone": (SMALL_LATENT["bedrooms"], {"resblock_updown": True}),
    "heads by channels, with context": (
        {"model": {"params": {**SMALL_LATENT["imagenet"]["model"]["params"]}}},
        {"num_heads": -1, "num_head_channels": 16},
    ),
    "deep transformers": (SMALL_LATENT["imagenet"], {"transformer_depth": 2}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_denoisers_outputs_are_equal(name: str) -> None:
    config, changes = VARIANTS[name]
    config = changed(config, **{UNET + k: v for k, v in changes.items()})
    for key in ("num_heads", "num_head_channels"):
        if unet_params(config).get(key, 0) in {None, -1}:
            del unet_params(config)[key]
    error, component = unet_error(config)
    assert error < 1e-10
    expected = {"churches": "FixedHeadsUNet2DModel", "bedrooms": "UNet2DModel", "imagenet": "UNet2DConditionModel"}
    assert component.name == expected.get(name, component.name)


def test_parts_of_a_fused_weight_are_saved(tmp_path: Path) -> None:
    """With one head, q, k and v are slices of the original weight."""
    config = changed(SMALL_LATENT["bedrooms"], **{UNET + "num_head_channels": -1, UNET + "num_heads": 1})
    params = {k: v for k, v in unet_params(config).items() if k != "num_head_channels"}
    component = latent_config.architecture(config)["unet"]
    converted = latent.convert_unet(randomized(LatentUNet(params)).state_dict(), component)
    unet: Any = load_exactly(component.build(), converted, "unet")
    unet.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == converted.keys()
    assert all(torch.equal(saved[k], converted[k]) for k in saved)


@pytest.mark.slow
@pytest.mark.parametrize("config", [BEDROOMS, CHURCHES, IMAGENET], ids=["bedrooms", "churches", "imagenet"])
def test_outputs_of_the_published_denoisers_are_equal(config: dict[str, Any]) -> None:
    assert unet_error(config)[0] < 1e-10


def first_stage_errors(stage: dict[str, Any]) -> tuple[float, float]:
    kind = VQFirstStage if stage["target"].endswith("VQModelInterface") else KLFirstStage
    original = randomized(kind(stage["params"]))
    component = latent_config.architecture(changed(BEDROOMS, **{FIRST: stage}))["vqvae"]
    vae: Any = load_exactly(component.build(), latent.convert_first_stage(original.state_dict(), component), "vae")
    size, factor = (
        min(stage["params"]["ddconfig"]["resolution"], 64),
        2 ** (len(stage["params"]["ddconfig"]["ch_mult"]) - 1),
    )
    images = noise(2, 3, size, size)
    latents = noise(2, stage["params"]["embed_dim"], size // factor, size // factor)
    encoded = vae.encode(images)
    got = encoded.latents if component.name == "VQModel" else encoded.latent_dist.parameters
    decoded = vae.decode(latents).sample
    return relative_error(got, original.encode(images)), relative_error(decoded, original.decode(latents))


@pytest.mark.parametrize(
    "stage",
    [
        VQ_SMALL,
        KL_SMALL,
        changed(VQ_SMALL, params__ddconfig__attn_resolutions=[8]),
        changed(KL_SMALL, params__ddconfig__attn_resolutions=[16, 8]),
        changed(VQ_SMALL, params__embed_dim=5),
    ],
    ids=["vq", "kl", "vq with attention", "kl with attention", "vq with other codes"],
)
def test_first_stages_outputs_are_equal(stage: dict[str, Any]) -> None:
    encoded, decoded = first_stage_errors(stage)
    assert encoded < 1e-10
    assert decoded < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("stage", [VQ_F4, KL_F8], ids=["vq-f4", "kl-f8"])
def test_outputs_of_the_published_first_stages_are_equal(stage: dict[str, Any]) -> None:
    assert max(first_stage_errors(stage)) < 1e-10


def model(name: str) -> tuple[LatentDiffusion, LatentUNet]:
    params = SMALL_LATENT[name]["model"]["params"]
    return randomized(LatentDiffusion(params)), randomized(LatentUNet(params["unet_config"]["params"]), seed=5)


def test_the_class_embedding_and_what_it_conditions() -> None:
    original, _ = model("imagenet")
    found = latent.find_weights({"state_dict": original.state_dict(), "global_step": 3}, None)
    assert found is not None
    architecture = latent_config.architecture(SMALL_LATENT["imagenet"])
    pipeline = assemble(architecture, latent.convert(found[0], architecture))
    assert pipeline.class_embedder.config.num_classes == 5  # and a sixth row for no class
    labels, x = torch.tensor([0, 4, 5]), noise(3, 3, 8, 8)
    context = original.cond_stage_model.embedding(labels)[:, None]
    expected = original.model.diffusion_model(x, TIMESTEPS[1:], context)
    got = pipeline.unet(x, TIMESTEPS[1:], encoder_hidden_states=pipeline.class_embedder(labels)).sample
    assert relative_error(got, expected) < 1e-10


def test_averaged_weights_are_taken_if_there_are_any() -> None:
    original, average = model("bedrooms")
    state = original.state_with_ema(average)
    raw = {k: v for k, v in state.items() if not k.startswith("model_ema.")}
    prefix = "model.diffusion_model."
    for content, ema, expected, averaged in (
        (state, None, average, True),
        (state, True, average, True),
        (state, False, original.model.diffusion_model, False),
        (raw, None, original.model.diffusion_model, False),
    ):
        found = latent.find_weights({"state_dict": content}, ema)
        assert found is not None
        assert found[1] == averaged
        for key, value in expected.state_dict().items():
            assert torch.equal(found[0][prefix + key], value), key
    with pytest.raises(UserError, match="--ema true: expected a checkpoint with a moving average"):
        latent.find_weights(raw, True)
    del state["model_ema.diffusion_modelout0bias"]
    with pytest.raises(UserError, match=r"none of 1: model.diffusion_model.out.0.bias; convert with --ema false"):
        latent.find_weights(state, None)
    assert latent.find_weights({"state_dict": {"other": torch.zeros(1)}}, None) is None
    assert latent.find_weights([1], None) is None


@pytest.mark.parametrize(
    ("name", "key", "pattern"),
    [
        (
            "bedrooms",
            "model.diffusion_model.input_blocks.1.0.odd.weight",
            r"do not map, 1: input_blocks.1.0.odd.weight",
        ),
        ("bedrooms", "model.diffusion_model.label_emb.weight", r"do not map, 1: label_emb.weight"),
        ("bedrooms", "first_stage_model.encoder.odd.weight", r"do not map, 1: encoder.odd.weight"),
        ("bedrooms", "cond_stage_model.embedding.weight", r"no place .* 1: cond_stage_model.embedding.weight"),
        ("imagenet", "model.diffusion_model.label_emb.weight", r"do not map, 1: label_emb.weight"),
        ("imagenet", "model.diffusion_model.odd.weight", r"do not map, 1: odd.weight"),
        ("imagenet", "control_model.weight", r"no place .* 1: control_model.weight"),
    ],
)
def test_weights_that_have_no_place_are_listed(name: str, key: str, pattern: str) -> None:
    original, _ = model(name)
    architecture = latent_config.architecture(SMALL_LATENT[name])
    with pytest.raises(UserError, match=pattern):
        latent.convert(original.state_dict() | {key: torch.zeros(2, 2)}, architecture)


@pytest.mark.parametrize(
    ("name", "key", "component"),
    [
        ("bedrooms", "model.diffusion_model.middle_block.1.qkv.weight", "unet"),
        ("imagenet", "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight", "unet"),
        ("imagenet", "first_stage_model.quantize.embedding.weight", "vae"),
        ("imagenet", "cond_stage_model.embedding.weight", "class_embedder"),
        ("churches", "first_stage_model.decoder.mid.attn_1.q.weight", "vqvae"),
    ],
)
def test_weights_that_are_missing_are_listed(name: str, key: str, component: str) -> None:
    original, _ = model(name)
    architecture = latent_config.architecture(SMALL_LATENT[name])
    state = original.state_dict()
    del state[key]
    with pytest.raises(UserError, match=rf"{component}: the checkpoint does not fit .* missing \d"):
        assemble(architecture, latent.convert(state, architecture))


def test_a_wrong_number_of_classes_is_named() -> None:
    original, _ = model("imagenet")
    architecture = latent_config.architecture(
        changed(SMALL_LATENT["imagenet"], model__params__cond_stage_config__params__n_classes=11)
    )
    with pytest.raises(UserError, match=r"class_embedder: .* shape 1: embedding.weight \(6, 24\) not \(11, 24\)"):
        assemble(architecture, latent.convert(original.state_dict(), architecture))


def test_weights_of_another_model_are_refused() -> None:
    original, _ = model("bedrooms")
    architecture = latent_config.architecture(SMALL_LATENT["imagenet"])
    with pytest.raises(UserError, match="config"):
        assemble(architecture, latent.convert(original.state_dict(), architecture))
    original, _ = model("imagenet")
    architecture = latent_config.architecture(SMALL_LATENT["churches"])
    with pytest.raises(UserError, match="config"):
        assemble(architecture, latent.convert(original.state_dict(), architecture))
