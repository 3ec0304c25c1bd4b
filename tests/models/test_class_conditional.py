"""The class-conditional latent pipelines: guidance, labels, their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from tcaq_lightning.models.class_conditional import (
    ClassConditionalLatentPipeline,
    ClassConditionalPipeline,
    ClassConditionalTransformerPipeline,
    ClassEmbedder,
)
from tcaq_lightning.models.pipelines import open_pipeline
from tests.toy_pipelines import latent_unet


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(1, 1, block_out_channels=(8,), latent_channels=3, norm_num_groups=4, scaling_factor=0.5)


def unet_pipeline() -> ClassConditionalLatentPipeline:
    embedder = ClassEmbedder(num_classes=5, embedding_dim=12)
    return ClassConditionalLatentPipeline(make_vae(), latent_unet(), DDIMScheduler(), embedder, {0: "a", 4: "e"})


def make_transformer(num_classes: int) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=4,
        patch_size=1,
        num_embeds_ada_norm=num_classes,
    ).eval()


def transformer_pipeline() -> ClassConditionalTransformerPipeline:
    return ClassConditionalTransformerPipeline(make_vae(), make_transformer(5), DDIMScheduler(), {0: "a", 4: "e"})


@pytest.fixture(params=[unet_pipeline, transformer_pipeline])
def pipeline(request: pytest.FixtureRequest) -> ClassConditionalPipeline:
    torch.manual_seed(0)
    pipeline: ClassConditionalPipeline = request.param()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: ClassConditionalPipeline, labels: list[int], **options: object) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(labels))]
    return pipeline(labels, num_inference_steps=3, generator=generators, output_type="latent", **options).images


def test_guidance_extrapolates_from_no_class_to_the_class(pipeline: ClassConditionalPipeline) -> None:
    """One step is linear in eps, so the guided sample lies on the line through the two others."""
    start = torch.randn(2, 3, 4, 4)

    def one_step(labels: list[int], scale: float) -> torch.Tensor:
        pipeline.scheduler = DDIMScheduler(clip_sample=False)
        return pipeline(labels, 1, scale, latents=start, output_type="latent").images

    conditional, unconditional, guided = one_step([1, 3], 1.0), one_step([5, 5], 1.0), one_step([1, 3], 4.0)
    torch.testing.assert_close(guided, unconditional + 4 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


def test_a_sample_is_that_of_its_generator_in_any_batch(pipeline: ClassConditionalPipeline) -> None:
    both = sample(pipeline, [1, 2], guidance_scale=2.0, eta=1.0)
    torch.testing.assert_close(sample(pipeline, [1], guidance_scale=2.0, eta=1.0), both[:1], rtol=1e-4, atol=1e-4)


def test_the_class_changes_the_sample(pipeline: ClassConditionalPipeline) -> None:
    assert not torch.equal(sample(pipeline, [1]), sample(pipeline, [2]))


def test_a_label_that_is_no_class_is_refused(pipeline: ClassConditionalPipeline) -> None:
    with pytest.raises(ValueError, match=r"expected 0..4, or 5 for no class, got 6"):
        sample(pipeline, [6])


def test_opens_from_its_files_and_samples_the_same(pipeline: ClassConditionalPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    opened = open_pipeline(str(tmp_path))
    assert type(opened) is type(pipeline)
    assert opened.labels == {"a": 0, "e": 4}
    assert opened.num_classes == 5
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            torch.testing.assert_close(opened.components[name].state_dict(), module.state_dict(), rtol=0, atol=0)
    expected = pipeline([0], 2, generator=torch.Generator().manual_seed(0), output_type="np").images
    images = opened([0], 2, generator=torch.Generator().manual_seed(0), output_type="np").images
    np.testing.assert_allclose(images, expected, atol=1e-5)  # bits depend on where in memory weights begin


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_transformer_samples_as_diffusers_own_pipeline_does(scale: float) -> None:
    """`DiTPipeline` takes label 1000 for "no class", so the two agree on a transformer of 1,000 classes."""
    torch.manual_seed(0)
    vae, transformer, scheduler = make_vae(), make_transformer(1000), DDIMScheduler(clip_sample=False)
    theirs = DiTPipeline(transformer, vae, scheduler)
    ours = ClassConditionalTransformerPipeline(vae, transformer, scheduler)
    images = []
    for pipeline in (theirs, ours):
        pipeline.set_progress_bar_config(disable=True)
        options = {"guidance_scale": scale, "num_inference_steps": 3, "output_type": "np"}
        images.append(pipeline([7, 999], generator=torch.Generator().manual_seed(1), **options).images)
    torch.testing.assert_close(torch.tensor(images[1]), torch.tensor(images[0]), rtol=1e-4, atol=1e-5)
