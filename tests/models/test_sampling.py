"""Sampling by pipelines with conditioning and guidance, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, LDMPipeline

from tcaq_lightning.config import ConditioningConfig, SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.denoiser_errors import noise_error
from tcaq_lightning.methods.par import mismatch
from tcaq_lightning.models.pipelines import open_pipeline
from tcaq_lightning.models.prompts import read_prompts
from tcaq_lightning.models.sampling import LoopSampling, PipelineSampling, make_sampling
from tcaq_lightning.models.trajectories import collect, probe
from tests.text_models import make_text_model
from tests.toy_pipelines import PIPELINES, autoencoder, latent_unet, make_pipeline, pixel_unet

STEPS = 3
SAMPLER = SamplerConfig(num_steps=STEPS)


@pytest.fixture
def build() -> Any:
    return make_pipeline


def denoiser_of(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


@pytest.mark.parametrize(("name", "guidance"), [("class", 3.0), ("class", 1.0), ("dit", 2.0), ("consistency", None)])
def test_recorded_calls_give_the_pipelines_own_predictions(build: Any, name: str, guidance: float | None) -> None:
    """Every recorded row, predicted anew on its own, equals what the pipeline saw within its guided batch."""
    pipeline = build(name)
    denoiser = denoiser_of(pipeline)
    sampling = make_sampling(pipeline, ConditioningConfig(guidance_scale=guidance, class_labels=[3, 1]))
    seen: list[torch.Tensor] = []
    handle = denoiser.register_forward_hook(lambda _m, _a, out: seen.append(out[0].clone()))
    found = collect(denoiser, sampling, SAMPLER, range(2), seed=4, batch_size=2)
    handle.remove()
    assert found.halves == (2 if guidance and guidance > 1 else 1)
    assert found.num_steps == STEPS * found.halves
    expected = torch.cat(seen)  # the steps outermost, then the rows of a sample, then the samples
    with torch.no_grad():
        got = torch.cat([found.flat()[i : i + 1].predict(denoiser) for i in range(len(expected))])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["class", "dit"])
def test_a_sample_does_not_depend_on_its_batch(build: Any, name: str) -> None:
    pipeline = build(name)
    sampling = make_sampling(pipeline, ConditioningConfig(guidance_scale=2.0))
    whole = sampling.sample(denoiser_of(pipeline), SAMPLER, range(3), seed=1)
    alone = sampling.sample(denoiser_of(pipeline), SAMPLER, [2], seed=1)
    torch.testing.assert_close(alone, whole[2:], rtol=1e-3, atol=1e-4)
    assert whole.shape[1] == sampling.channels(denoiser_of(pipeline))
    assert whole.abs().max() <= 1


def test_trajectories_join_over_batches_with_their_labels(build: Any) -> None:
    pipeline = build("class")
    sampling = make_sampling(pipeline, ConditioningConfig(guidance_scale=2.0))
    together = collect(pipeline.unet, sampling, SAMPLER, range(5), 0, batch_size=5)
    apart = collect(pipeline.unet, sampling, SAMPLER, range(5), 0, batch_size=2)
    (context,) = together.conditioning.tensors.values()
    assert context.shape[:2] == (2, 5)  # no-class and class, the same at every step
    order = sampling.manifest()["class_labels"]
    assert sorted(order) == list(range(5))
    labels = pipeline.class_embedder(torch.tensor(order))
    torch.testing.assert_close(context[1], labels)
    assert torch.equal(*(next(iter(t.conditioning.tensors.values())) for t in (together, apart)))
    torch.testing.assert_close(apart.inputs, together.inputs, rtol=1e-4, atol=1e-4)
    chosen = together.select(torch.tensor([4, 0]))
    assert torch.equal(next(iter(chosen.conditioning.tensors.values()))[1], labels[[4, 0]])


def test_packed_trajectories_are_the_same(build: Any) -> None:
    pipeline = build("class")
    sampling = make_sampling(pipeline, ConditioningConfig(guidance_scale=2.0))
    found = collect(pipeline.unet, sampling, SAMPLER, range(2), 0, batch_size=2)
    again = type(found).unpacked(*found.packed())
    assert torch.equal(again.inputs, found.inputs)
    assert again.conditioning == found.conditioning
    assert again.halves == found.halves == 2


def test_errors_are_by_step_whatever_the_rows(build: Any) -> None:
    pipeline = build("class")
    sampling = make_sampling(pipeline, ConditioningConfig(guidance_scale=2.0))
    found = collect(pipeline.unet, sampling, SAMPLER, range(4), 0, batch_size=4)
    other = latent_unet().requires_grad_(False).eval()
    result = noise_error(pipeline.unet, other, found, batch_size=3)
    assert result.timesteps.tolist() == found.timesteps[::2].tolist()
    with torch.no_grad():
        f, q = (found.flat().predict(m).double().view(STEPS, 2 * 4, -1) for m in (pipeline.unet, other))
    expected = (q - f).square().sum((1, 2)) / f.square().sum((1, 2))
    torch.testing.assert_close(result.relative, expected, rtol=1e-4, atol=0.0)
    assert mismatch(found, found).tolist() == [0.0] * STEPS


@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_probe_tells_the_calls_at_the_cost_of_one(build: Any, name: str) -> None:
    pipeline = build(name)
    denoiser = denoiser_of(pipeline)
    sampling = make_sampling(pipeline, ConditioningConfig())
    real = collect(denoiser, sampling, SAMPLER, [0, 1], 0, 2)
    calls: list[int] = []
    handle = (
        denoiser.conv_in.register_forward_hook(lambda *_: calls.append(1)) if hasattr(denoiser, "conv_in") else None
    )
    found = probe(denoiser, sampling, SAMPLER)
    if handle is not None:
        handle.remove()
        assert calls == [1]
    assert torch.equal(found.timesteps, real.timesteps)
    assert torch.equal(found.inputs[: found.halves], real.inputs[: found.halves])
    assert found.conditioning == real.conditioning
    assert "forward" not in vars(denoiser)


def test_the_pipeline_is_left_as_it_was(build: Any) -> None:
    pipeline = build("class")
    before = dict(pipeline.components)
    sampling = make_sampling(pipeline, ConditioningConfig())
    sampling.sample(latent_unet().eval(), SamplerConfig("UniPCMultistepScheduler", 2), [0], 0)
    assert all(pipeline.components[name] is part for name, part in before.items())


def test_latents_of_an_unconditional_pipeline_are_decoded() -> None:
    torch.manual_seed(0)
    vae, unet = autoencoder(1, 3), pixel_unet(3)
    sampling = make_sampling(LDMPipeline(vae, unet, DDIMScheduler(clip_sample=False)), ConditioningConfig())
    assert isinstance(sampling, LoopSampling)
    latents = LoopSampling(sampling.scheduler).sample(unet, SAMPLER, [0, 1], 0)
    with torch.no_grad():
        expected = torch.cat([vae.decode(x).sample for x in (latents / 0.5).split(1)])
    assert torch.equal(sampling.sample(unet, SAMPLER, [0, 1], 0), expected)
    assert sampling.channels(unet) == 1


def test_manifest_names_what_decides(build: Any) -> None:
    pipeline = build("class")
    manifest = make_sampling(pipeline, ConditioningConfig(class_labels=[2])).manifest()
    assert manifest["class_labels"] == [2]
    assert manifest["guidance_scale"] == 1.0  # the pipeline's own
    before = manifest["components"]["vae"]
    next(iter(pipeline.vae.parameters())).mul_(1.01)
    changed = make_sampling(pipeline, ConditioningConfig(class_labels=[2])).manifest()
    assert changed["components"]["vae"] != before
    assert set(changed["components"]) == {"vae", "class_embedder"}


def test_conditioning_that_does_not_fit_is_named(build: Any, tmp_path: Path) -> None:
    unconditional = DDIMPipeline(pixel_unet(), DDIMScheduler())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boot\n")
    cases: list[tuple[Any, ConditioningConfig, str]] = [
        (unconditional, ConditioningConfig(guidance_scale=2.0), "conditioning.guidance_scale: a DDIMPipeline"),
        (unconditional, ConditioningConfig(class_labels=[0]), "conditioning.class_labels: a DDIMPipeline"),
        (unconditional, ConditioningConfig(prompts=prompts), "conditioning.prompts: a DDIMPipeline"),
        (build("class"), ConditioningConfig(class_labels=[0, 5]), "in 0..4 for the model's 5 classes, got 5"),
        (build("class"), ConditioningConfig(prompts=prompts), "takes no prompts"),
        (build("class"), ConditioningConfig(negative_prompt="x"), "conditioning.negative_prompt"),
        (build("class"), ConditioningConfig(options={"hight": 3}), "takes no 'hight'"),
        (build("class"), ConditioningConfig(options={"num_inference_steps": 9}), "calibration.sampler.num_steps"),
        (build("class"), ConditioningConfig(options={"guidance_scale": 9.0}), "give conditioning.guidance_scale"),
        (build("consistency"), ConditioningConfig(guidance_scale=2.0), "conditioning.guidance_scale"),
        (DDIMPipeline(pixel_unet(num_class_embeds=4), DDIMScheduler()), ConditioningConfig(), "no class labels"),
    ]
    for pipeline, conditioning, words in cases:
        with pytest.raises(UserError, match=words):
            make_sampling(pipeline, conditioning)


def test_a_pipeline_that_fails_is_one_line(build: Any) -> None:
    pipeline = build("class")
    sampling = make_sampling(pipeline, ConditioningConfig(options={"latents": "noise"}))
    assert isinstance(sampling, PipelineSampling)
    with pytest.raises(UserError, match="UNet2DConditionModel cannot be sampled in 3 steps like this") as raised:
        probe(pipeline.unet, sampling, SAMPLER)
    assert "\n" not in str(raised.value)
    assert "forward" not in vars(pipeline.unet)


def test_prompts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red boot\n\n  a bag \n", encoding="utf-8")
    assert read_prompts(file, "conditioning.prompts") == ["a red boot", "a bag"]
    for content, words in ((b"\n \n", "is empty"), (b"\xff\xfe\xfa", "cannot read")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_prompts(file, "conditioning.prompts")
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path / "none.txt", "conditioning.prompts")


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("transformers")
    pipeline = make_text_model("Stable Diffusion", tmp_path_factory.mktemp("tokenizer"))
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    return pipeline


def prompts_file(directory: Path, *lines: str) -> Path:
    (directory / "prompts.txt").write_text("\n".join(lines))
    return directory / "prompts.txt"


def test_prompts_reach_the_denoiser_in_both_rows(text_to_image: Any, tmp_path: Path) -> None:
    conditioning = ConditioningConfig(prompts_file(tmp_path, "a red boot", "a bag"), guidance_scale=7.5)
    sampling = make_sampling(text_to_image, conditioning)
    found = collect(text_to_image.unet, sampling, SAMPLER, range(3), 0, batch_size=3)
    assert found.halves == 2
    assert found.num_steps == 2 * (STEPS + 1)  # PLMS calls the denoiser once more than it has steps
    (context,) = found.conditioning.tensors.values()
    assert context.shape == (2, 3, 16, 16)
    assert torch.equal(context[0, 0], context[0, 1])  # no prompt
    assert torch.equal(context[1, 0], context[1, 2])  # the first prompt again
    assert not torch.equal(context[1, 0], context[1, 1])
    negative = make_sampling(text_to_image, replace(conditioning, negative_prompt="ugly"))
    other = collect(text_to_image.unet, negative, SAMPLER, range(3), 0, batch_size=3)
    (changed,) = other.conditioning.tensors.values()
    assert not torch.equal(changed[0], context[0])
    assert torch.equal(changed[1], context[1])


def test_a_pipeline_for_text_needs_prompts(text_to_image: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"conditioning\.prompts: a StableDiffusionPipeline needs prompts"):
        make_sampling(text_to_image, ConditioningConfig())
    manifest = make_sampling(text_to_image, ConditioningConfig(prompts_file(tmp_path, "x", "y"))).manifest()
    assert manifest["prompts"] == ["x", "y"]
    assert manifest["guidance_scale"] == 7.5  # the pipeline's own
    assert set(manifest["components"]) == {"vae", "text_encoder"}


def test_a_text_pipeline_opens_by_variant_and_type(text_to_image: Any, tmp_path: Path) -> None:
    text_to_image.save_pretrained(tmp_path / "model", variant="fp16")
    with pytest.raises(UserError, match="cannot load unet"):
        open_pipeline(str(tmp_path / "model"))
    opened: Any = open_pipeline(str(tmp_path / "model"), "fp16", torch.bfloat16)
    assert {m.dtype for m in (opened.unet, opened.vae, opened.text_encoder)} == {torch.bfloat16}
    expected = text_to_image.unet.conv_in.weight.bfloat16()
    assert torch.equal(opened.unet.conv_in.weight, expected)
