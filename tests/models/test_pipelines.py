from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DDPMScheduler
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file

from tcaq_lightning.config import SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import (
    denoiser_bytes,
    find_denoiser,
    initial_noise,
    make_scheduler,
    one_by_one,
    open_pipeline,
    sample,
    sample_shape,
    shipped,
    to_images,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def directory(make_unet: Any, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    DDIMPipeline(make_unet(attention=False), DDIMScheduler(clip_sample=False)).save_pretrained(path)
    return path


def test_an_opened_model_is_frozen_and_computes_what_was_saved(make_unet: Any, directory: Path) -> None:
    name, denoiser = find_denoiser(open_pipeline(str(directory)))
    assert name == "unet"
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(denoiser(x, 5).sample, make_unet(attention=False)(x, 5).sample)
    assert denoiser_bytes(denoiser) == sum(v.nbytes for v in load_file(directory / "unet" / WEIGHTS).values())
    assert sample_shape(denoiser) == (1, 8, 8)


def expect_error(path: Path | str, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        open_pipeline(str(path))
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expect_error("someone/nothing", "no directory someone/nothing, .* the hub cannot be reached")
    assert time.perf_counter() - began < 5


def test_what_is_wrong_with_a_model_is_said_in_one_line(directory: Path) -> None:
    weights = directory / "unet" / WEIGHTS
    good = load_file(weights)
    expect_error("./nowhere", "no model at")
    expect_error("nowhere", "no model at")
    for name, content, pattern in (
        ("NaN", good | {"conv_in.weight": good["conv_in.weight"] * torch.nan}, "conv_in.weight .* is NaN or infinite"),
        ("shape", good | {"conv_in.weight": good["conv_in.weight"][:4].clone()}, "cannot load unet"),
        ("missing", {k: v for k, v in good.items() if k != "conv_in.weight"}, "1 missing keys .* conv_in.weight"),
        ("more", good | {"odd.weight": torch.zeros(1)}, "1 unexpected keys .* odd.weight"),
    ):
        save_file(content, weights, metadata={"format": "pt"})
        expect_error(directory, pattern)
        assert name
    weights.write_bytes(weights.read_bytes()[:100])
    expect_error(directory, "cannot load unet")
    index = directory / "model_index.json"
    entries = json.loads(index.read_text())
    index.write_text(json.dumps(entries | {"unet": ["diffusers", "NoSuchModel"]}))
    expect_error(directory, "NoSuchModel")
    del entries["unet"]
    index.write_text(json.dumps(entries))
    expect_error(directory, "no denoiser")
    index.unlink()
    expect_error(directory, "model_index.json")


def test_shipped_models_are_found_by_name_only() -> None:
    assert shipped("no-such-model") is None
    assert shipped("") is None
    assert shipped("../assets") is None


def test_schedulers_take_over_the_models_noise_schedule() -> None:
    own = DDPMScheduler(beta_start=0.01, beta_end=0.03, prediction_type="v_prediction")
    made = make_scheduler(own, SamplerConfig(scheduler="DDIMScheduler", num_steps=7, options={"clip_sample": False}))
    assert isinstance(made, DDIMScheduler)
    assert (made.config.beta_start, made.config.prediction_type, made.config.clip_sample) == (
        0.01,
        "v_prediction",
        False,
    )
    assert len(made.timesteps) == 7
    assert isinstance(make_scheduler(own, SamplerConfig(num_steps=7)), DDPMScheduler)


@pytest.mark.parametrize(
    ("sampler", "pattern"),
    [
        (SamplerConfig(scheduler="NoSuchScheduler"), "somewhere.scheduler must be .* 'NoSuchScheduler'"),
        (SamplerConfig(scheduler="UNet2DModel"), "somewhere.scheduler must be"),
        (SamplerConfig(options={"clip_sampl": False}), "has no option 'clip_sampl'; it has .*'trained_betas'"),
        (SamplerConfig(options={"self": 1}), "has no option 'self'"),
        (SamplerConfig(num_steps=5000), "with 5000 steps"),
    ],
)
def test_wrong_sampler_settings_are_named(sampler: SamplerConfig, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        make_scheduler(DDIMScheduler(), sampler, "somewhere")
    assert "\n" not in str(caught.value)


def test_noise_belongs_to_the_sample_and_the_seed() -> None:
    x, _ = initial_noise((1, 4, 4), [3, 5], seed=1)
    y, _ = initial_noise((1, 4, 4), [5, 9, 3], seed=1)
    assert torch.equal(x[0], y[2])
    assert torch.equal(x[1], y[0])
    assert not torch.equal(x[0], initial_noise((1, 4, 4), [3], seed=2)[0][0])


def test_sampling_equals_diffusers_own_pipeline(make_unet: Any) -> None:
    unet, scheduler = make_unet(attention=False), DDIMScheduler(clip_sample=False)
    got = to_images(sample(unet, scheduler, SamplerConfig(num_steps=4), [2], seed=0))
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    _, (generator,) = initial_noise((1, 8, 8), [2], seed=0)
    generator.manual_seed(2)
    expected = pipeline(batch_size=1, generator=generator, num_inference_steps=4, output_type="np").images
    torch.testing.assert_close(got, torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


def test_images_are_decoded_one_by_one_for_a_while() -> None:
    decoder = AutoencoderKL(1, 1, block_out_channels=(8,), latent_channels=2, norm_num_groups=4).eval()
    latents = torch.randn(3, 2, 4, 4)
    sizes: list[int] = []
    decoder.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    with torch.no_grad():
        together = decoder.decode(latents).sample
        with one_by_one(decoder):
            singly = decoder.decode(latents).sample
        decoder.decode(latents)
    assert sizes == [3, 1, 1, 1, 3]
    torch.testing.assert_close(singly, together)
    with one_by_one(None):  # no latents, no decoder
        pass
