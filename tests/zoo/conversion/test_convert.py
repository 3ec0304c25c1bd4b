"""`python -m tcaq_lightning convert`: directories that open, sample and repeat the original; mistakes in one line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DiffusionPipeline, LDMPipeline

from tcaq_lightning.__main__ import main
from tcaq_lightning.config import SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.class_conditional import ClassConditionalLatentPipeline
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline, sample
from tcaq_lightning.zoo.conversion import latent, latent_config
from tcaq_lightning.zoo.conversion.architecture import ARCHITECTURES, Component, read_architecture
from tcaq_lightning.zoo.conversion.convert import assemble, read_tokenizer
from tests.zoo.conversion.originals import DDIMModel, LatentDiffusion, LatentUNet, randomized, relative_error
from tests.zoo.conversion.published import (
    DDIM_CIFAR10,
    DDIM_SMALL,
    KL_SMALL,
    SMALL_LATENT,
    STABLE_DIFFUSION,
    changed,
    small,
)

TIMESTEPS = torch.tensor([1, 500, 999])


def run(*arguments: object) -> int:
    return main(["convert", *(str(a) for a in arguments)])


def write_yaml(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def ddim_file(tmp_path: Path) -> tuple[Path, DDIMModel]:
    original = randomized(DDIMModel(DDIM_SMALL))
    path = tmp_path / "model-790000.ckpt"
    torch.save(original.state_dict(), path)
    return path, original


def latent_file(name: str, path: Path) -> tuple[Path, Path, LatentDiffusion, LatentUNet]:
    """Checkpoint and YAML file of a small model, and its networks: as trained, and their average."""
    params = SMALL_LATENT[name]["model"]["params"]
    original = randomized(LatentDiffusion(params))
    average = randomized(LatentUNet(params["unet_config"]["params"]), seed=5)
    torch.save({"state_dict": original.state_with_ema(average), "global_step": 7}, path / "model.ckpt")
    return path / "model.ckpt", write_yaml(path / "config.yaml", SMALL_LATENT[name]), original, average


def test_a_ddim_checkpoint(ddim_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, original = ddim_file
    output = tmp_path / "new" / "model"
    assert run(source, output, "--architecture", write_yaml(tmp_path / "c.yml", DDIM_SMALL)) == 0
    assert "as stored, parameters: unet " in capsys.readouterr().out
    pipeline = open_pipeline(str(output))
    assert isinstance(pipeline, DDIMPipeline)
    _, denoiser = find_denoiser(pipeline)
    x = torch.randn(3, 3, 16, 16)
    assert relative_error(denoiser(x, TIMESTEPS).sample, original(x, TIMESTEPS)) < 1e-10
    images = sample(denoiser, pipeline.scheduler, SamplerConfig("QuadraticDDIMScheduler", 8), [0, 1], seed=0)
    assert images.isfinite().all()
    record = json.loads((output / "conversion.json").read_text())
    assert record["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert record["parameters"] == {"unet": sum(p.numel() for p in original.parameters())}
    assert not [f for f in output.rglob("*") if f.suffix not in {".json", ".safetensors", ""}]


@pytest.mark.slow
def test_a_ddim_checkpoint_by_the_name_of_its_architecture(tmp_path: Path) -> None:
    original = randomized(DDIMModel(DDIM_CIFAR10))
    torch.save([{}, {}, 1, 2, original.state_dict()], tmp_path / "ckpt.pth")
    torch.save([original.state_dict(), {}, 1, 2, original.state_dict()], tmp_path / "ckpt.pth")
    assert run(tmp_path / "ckpt.pth", tmp_path / "model", "--architecture", "ddim-cifar10") == 0
    assert json.loads((tmp_path / "model" / "conversion.json").read_text())["weights"] == "moving average"
    x = torch.randn(3, 3, 32, 32)
    _, denoiser = find_denoiser(open_pipeline(str(tmp_path / "model")))
    assert relative_error(denoiser(x, TIMESTEPS).sample, original(x, TIMESTEPS)) < 1e-10


@pytest.mark.parametrize("name", ["bedrooms", "churches"])
def test_unconditional_latent_diffusion(name: str, tmp_path: Path) -> None:
    source, config, original, average = latent_file(name, tmp_path)
    assert run(source, tmp_path / "model", "--architecture", config) == 0
    pipeline: Any = open_pipeline(str(tmp_path / "model"))
    assert isinstance(pipeline, LDMPipeline)
    _, denoiser = find_denoiser(pipeline)
    x = torch.randn(3, denoiser.config.in_channels, 8, 8)
    assert relative_error(denoiser(x, TIMESTEPS).sample, average(x, TIMESTEPS)) < 1e-10
    scale = float(getattr(original, "scale_factor", torch.tensor(1.0)))
    got = pipeline.vqvae.decode(x / pipeline.vqvae.config.scaling_factor).sample
    assert relative_error(got, original.first_stage_model.decode(x / scale)) < 1e-10
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape[-1] == 3


def test_class_conditional_latent_diffusion(tmp_path: Path) -> None:
    source, config, original, average = latent_file("imagenet", tmp_path)
    assert run(source, tmp_path / "ema", "--architecture", config) == 0
    assert run(source, tmp_path / "raw", "--architecture", config, "--ema", "false") == 0
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 2, 5])
    context = original.cond_stage_model.embedding(labels)[:, None]
    for which, unet in (("ema", average), ("raw", original.model.diffusion_model)):
        pipeline: Any = open_pipeline(str(tmp_path / which))
        assert isinstance(pipeline, ClassConditionalLatentPipeline)
        got = pipeline.unet(x, TIMESTEPS, encoder_hidden_states=pipeline.class_embedder(labels)).sample
        assert relative_error(got, unet(x, TIMESTEPS, context)) < 1e-10
    images = pipeline([1, 3], num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert images.shape == (2, 32, 32, 3)


def clip_files(path: Path) -> Path:
    """The smallest CLIP tokenizer: single letters, and the two marks."""
    path.mkdir()
    words = [*"abc", *(f"{c}</w>" for c in "abc"), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    return path


def test_stable_diffusion(tmp_path: Path) -> None:
    """With a small text encoder: its size is not in the YAML file, since all 1.x models have the same."""
    transformers = pytest.importorskip("transformers")
    config = small(STABLE_DIFFUSION, KL_SMALL, channel_mult=[1, 2], attention_resolutions=[1], context_dim=24)
    original = randomized(LatentDiffusion(config["model"]["params"]))
    sizes = {"vocab_size": 8, "hidden_size": 24, "intermediate_size": 48, "projection_dim": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 77}
    text = randomized(transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)))
    weights = {
        f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v
        for k, v in text.state_dict().items()
    }
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    architecture = latent_config.architecture(config).replacing(
        text_encoder=Component("transformers", "CLIPTextModel", sizes)
    )
    found = latent.find_weights({"state_dict": original.state_dict() | weights | positions}, None)
    assert found is not None
    tokenizer = read_tokenizer(str(clip_files(tmp_path / "clip")))
    assert tokenizer.model_max_length == 77  # CLIP's positions
    assemble(architecture, latent.convert(found[0], architecture), tokenizer).save_pretrained(tmp_path / "model")
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    tokens = torch.tensor([[6, 0, 1, 5, 7]])
    expected = text(tokens).last_hidden_state
    assert relative_error(pipeline.text_encoder(tokens).last_hidden_state, expected) < 1e-10
    x = torch.randn(3, 4, 8, 8)
    context = expected.expand(3, -1, -1)
    got = pipeline.unet(x, TIMESTEPS, encoder_hidden_states=context).sample
    assert relative_error(got, original.model.diffusion_model(x, TIMESTEPS, context)) < 1e-10
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a b", num_inference_steps=2, guidance_scale=7.5, output_type="np").images.shape[-1] == 3
    with pytest.raises(UserError, match="--tokenizer /nowhere: cannot be read"):
        read_tokenizer("/nowhere")
    with pytest.raises(UserError, match=r"--tokenizer: .*vocab.json"):
        read_tokenizer(None)


def test_the_architecture_of_stable_diffusion_has_clips_sizes() -> None:
    pytest.importorskip("transformers")
    component = read_architecture(ARCHITECTURES / "stable-diffusion-v1-4")["text_encoder"]
    with torch.device("meta"):
        encoder = component.load_class()(component.load_class().config_class(**component.config))
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480  # ViT-L/14's text model


def mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, *arguments: object) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert text in err
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


def test_mistakes_with_a_ddim_checkpoint(ddim_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = ddim_file
    output = tmp_path / "model"
    good = write_yaml(tmp_path / "good.yml", DDIM_SMALL)
    deeper = write_yaml(tmp_path / "deeper.yml", changed(DDIM_SMALL, model__num_res_blocks=3))
    latent_yaml = write_yaml(tmp_path / "latent.yml", SMALL_LATENT["bedrooms"])
    (tmp_path / "text.yml").write_text("just text")
    (tmp_path / "broken.yml").write_text("a: [")
    cut, foreign = tmp_path / "cut.ckpt", tmp_path / "foreign.ckpt"
    cut.write_bytes(source.read_bytes()[:5000])
    torch.save({"weight": torch.zeros(3)}, foreign)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    for text, *arguments in (
        ("that does not say its architecture; give its YAML file, or one of ddim-cifar10, ddim-lsun", source, output),
        ("a YAML file or one of ddim-cifar10", source, output, "--architecture", tmp_path / "no.yml"),
        ("missing 86: down_blocks.0.resnets.2", source, output, "--architecture", deeper),
        ("--architecture: data is missing", source, output, "--architecture", latent_yaml),
        ("unet: the checkpoint does not fit a UNet2DModel", source, output, "--architecture", "ddim-cifar10"),
        (
            "for a checkpoint of the DDIM repository, a YAML file or one of ddim-cifar10, ddim-lsun\n",
            source,
            output,
            "--architecture",
            "lsun-bedrooms-ldm4",
        ),
        ("expected keys and values, got str", source, output, "--architecture", tmp_path / "text.yml"),
        ("no valid YAML", source, output, "--architecture", tmp_path / "broken.yml"),
        ("expected a checkpoint with a moving average", source, output, "--architecture", good, "--ema", "true"),
        ("got no file", tmp_path / "none.ckpt", output, "--architecture", good),
        ("damaged or foreign", cut, output, "--architecture", good),
        ("got neither", foreign, output, "--architecture", good),
        ("expected a directory that is new or empty", source, full, "--architecture", good),
        ("expected a directory that is new or empty", source, source, "--architecture", good),
    ):
        mistake(tmp_path, capsys, str(text), *arguments)


def test_mistakes_with_a_latent_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, good, _, _ = latent_file("churches", tmp_path)
    output = tmp_path / "model"
    schedule = write_yaml(
        tmp_path / "schedule.yaml", changed(SMALL_LATENT["churches"], model__params__linear_end=0.0195)
    )
    other = write_yaml(tmp_path / "other.yaml", SMALL_LATENT["imagenet"])
    stable = small(STABLE_DIFFUSION, KL_SMALL, channel_mult=[1, 2], attention_resolutions=[1], context_dim=24)
    content = torch.load(source, weights_only=True)
    del content["state_dict"]["scale_factor"]
    torch.save(content, tmp_path / "unscaled.ckpt")
    for text, *arguments in (
        ("or one of imagenet-ldm4, lsun-bedrooms-ldm4, lsun-churches-ldm8, stable-diffusion-v1-4", source, output),
        ("scheduler: the config's noise schedule", source, output, "--architecture", schedule),
        ("config", source, output, "--architecture", other),
        (
            "for a checkpoint of CompVis, a YAML file or one of imagenet-ldm4",
            source,
            output,
            "--architecture",
            "ddim-lsun",
        ),
        ("expected a factor of the latents", tmp_path / "unscaled.ckpt", output, "--architecture", good),
        ("--tokenizer", source, output, "--architecture", write_yaml(tmp_path / "stable.yaml", stable)),
    ):
        mistake(tmp_path, capsys, str(text), *arguments)


def test_a_failure_while_writing_leaves_nothing(
    ddim_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = ddim_file
    good = write_yaml(tmp_path / "good.yml", DDIM_SMALL)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "model"))

    monkeypatch.setattr("tcaq_lightning.zoo.conversion.convert.write_json", full)
    mistake(tmp_path, capsys, "No space left", source, tmp_path / "model", "--architecture", good)


def test_an_empty_directory_is_taken_and_config_is_another_name(ddim_file: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert run(ddim_file[0], tmp_path / "model", "--config", write_yaml(tmp_path / "c.yml", DDIM_SMALL)) == 0
    assert (tmp_path / "model" / "model_index.json").is_file()
