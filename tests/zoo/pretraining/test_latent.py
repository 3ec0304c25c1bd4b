from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import open_pipeline
from tcaq_lightning.zoo.pretraining import autoencoder, latent
from tcaq_lightning.zoo.pretraining.autoencoder import load_autoencoder, new_autoencoder
from tcaq_lightning.zoo.pretraining.idx import read_split
from tcaq_lightning.zoo.pretraining.latent import (
    CLASSES,
    SCHEDULE,
    LatentPretraining,
    LatentRecipe,
    encode_once,
    load_weights,
    main,
    new_denoiser,
)
from tests.zoo.pretraining.conftest import killed

SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 4, "warmup": 2, "save_every": 2}
WEIGHTS = {
    kind: [Path(part, "diffusion_pytorch_model.safetensors") for part in parts]
    for kind, parts in (("unet", ("unet", "class_embedder")), ("dit", ("transformer",)))
}
KINDS = pytest.mark.parametrize("kind", ["unet", "dit"])


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"block_out_channels": (8, 8), "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 8}
    monkeypatch.setattr(latent, "UNET", latent.UNET | narrow)
    monkeypatch.setattr(
        latent, "DIT", latent.DIT | {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    )


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny autoencoder."""
    directory = tmp_path_factory.mktemp("vae")
    with pytest.MonkeyPatch.context() as patch:
        narrow = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "scaling_factor": 2.5}
        patch.setattr(autoencoder, "ARCHITECTURE", autoencoder.ARCHITECTURE | narrow)
        new_autoencoder(seed=0).save_pretrained(directory)
    return directory


def pretraining(kind: str, data: Path, vae: Path, recipe: LatentRecipe) -> LatentPretraining:
    images, labels = read_split(data, "train")
    opened = load_autoencoder(vae)
    network = new_denoiser(kind, opened, 28, seed=0)
    latents = encode_once(opened, images)
    module = LatentPretraining(network, DDIMScheduler(**SCHEDULE), opened, latents, labels, recipe)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    return module


@KINDS
def test_resumed_run_equals_uninterrupted_run(kind: Any, data: Path, vae: Path, tmp_path: Path) -> None:
    main(data, vae, tmp_path / "whole", denoiser=kind, **SETTINGS)
    with killed(LatentPretraining, 3):
        main(data, vae, tmp_path / "parts", denoiser=kind, **SETTINGS)
    half = [load_file(tmp_path / "parts" / "model" / file) for file in WEIGHTS[kind]]
    main(data, vae, tmp_path / "parts", denoiser=kind, **SETTINGS)
    for file, before in zip(WEIGHTS[kind], half, strict=True):
        expected, resumed = (load_file(tmp_path / run / "model" / file) for run in ("whole", "parts"))
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], value) for key, value in expected.items())
        assert any(not torch.equal(before[key], value) for key, value in expected.items())


@KINDS
def test_export_opens_and_samples(kind: str, data: Path, vae: Path, tmp_path: Path) -> None:
    module = pretraining(kind, data, vae, LatentRecipe(steps=1, batch_size=4))
    module.export(tmp_path / "model")
    pipeline: Any = open_pipeline(str(tmp_path / "model"))
    assert pipeline.num_classes == 10
    assert pipeline.labels["Ankle boot"] == 9
    assert pipeline.vae.config.scaling_factor == 2.5
    assert {key: pipeline.scheduler.config[key] for key in SCHEDULE} == SCHEDULE
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipeline([0, 9, 10], 3, guidance_scale=2.0, generator=generators, output_type="pt").images
    assert images.shape == (3, 1, 28, 28)
    assert images.isfinite().all()


@KINDS
def test_learns(kind: str, data: Path, vae: Path) -> None:
    module = pretraining(kind, data, vae, LatentRecipe(steps=40, batch_size=16))
    optimizer = torch.optim.AdamW(module.network.parameters(), lr=3e-3)
    losses = []
    for i in range(40):
        optimizer.zero_grad()
        loss = module.training_step(i, i)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
def test_labels_are_dropped_for_the_whole_network_at_the_rate_asked_for(
    dropout: float, data: Path, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pretraining("dit", data, vae, LatentRecipe(steps=1, batch_size=96, label_dropout=dropout))
    transformer = module.network.transformer
    seen: list[list[torch.Tensor]] = [[] for _ in transformer.transformer_blocks]
    for calls, block in zip(seen, transformer.transformer_blocks, strict=True):
        table = block.norm1.emb.class_embedder.embedding_table
        assert table.num_embeddings == len(CLASSES) + 1
        table.register_forward_pre_hook(lambda _module, args, calls=calls: calls.append(args[0]))
    assert transformer.training
    module.training_step(0, 0)
    asked = seen[0][0]
    assert all(torch.equal(labels, asked) for calls in seen for labels in calls)
    share = float((asked == len(CLASSES)).double().mean())
    assert share == pytest.approx(dropout, abs=0.12)
    kept = asked != len(CLASSES)
    _, labels = read_split(data, "train")
    assert (asked[kept].bincount(minlength=2) <= labels.bincount()).all()  # an epoch has each image once


def test_the_transformer_begins_as_adaln_zero(data: Path, vae: Path) -> None:
    """At first every block is the identity and the prediction is 0, whatever the input."""
    network = new_denoiser("dit", load_autoencoder(vae), 28, seed=0)
    x, t, labels = torch.randn(2, 4, 7, 7), torch.tensor([3, 900]), torch.tensor([0, 10])
    assert not network(x, t, labels).any()
    tokens = torch.randn(2, 49, 16)
    block = network.transformer.transformer_blocks[0]
    torch.testing.assert_close(block(tokens, timestep=t, class_labels=labels), tokens)


def test_latents_are_scaled_posteriors(data: Path, vae: Path) -> None:
    module = pretraining("dit", data, vae, LatentRecipe(steps=1, batch_size=4))
    images, _ = read_split(data, "train")
    posterior = load_autoencoder(vae).encode(images[:, None] / 127.5 - 1).latent_dist
    torch.testing.assert_close(module.mean, 2.5 * posterior.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.deviation, 2.5 * posterior.std, rtol=1e-4, atol=1e-4)


def test_images_are_encoded_once(data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = read_split(data, "train")
    opened, cache = load_autoencoder(vae), tmp_path / "latents"
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return autoencoder.encode(*args)

    monkeypatch.setattr(latent, "encode", counted)
    first, second = encode_once(opened, images, cache), encode_once(opened, images, cache)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(calls) == 1
    encode_once(opened, images[:50], cache)  # other images
    with torch.no_grad():
        opened.quant_conv.bias += 1  # another autoencoder
    shifted, _ = encode_once(opened, images[:50], cache)
    torch.testing.assert_close(shifted, first[0][:50] + 1)
    assert len(calls) == 3
    cache.write_bytes(cache.read_bytes()[:-1])
    assert torch.equal(encode_once(opened, images[:50], cache)[0], shifted)


@KINDS
def test_starts_from_the_weights_of_a_pipeline(kind: str, data: Path, vae: Path, tmp_path: Path) -> None:
    module = pretraining(kind, data, vae, LatentRecipe(steps=1, batch_size=4))
    module.export(tmp_path / "model")
    other = new_denoiser(kind, load_autoencoder(vae), 28, seed=1)
    expected = module.network.state_dict()
    assert any(not torch.equal(value, expected[key]) for key, value in other.state_dict().items())
    load_weights(other, tmp_path / "model")
    assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(("kind", "other"), [("unet", "fashion-mnist-dit"), ("dit", "fashion-mnist-dit")])
def test_a_pipeline_of_another_architecture(kind: str, other: str, vae: Path) -> None:
    network = new_denoiser(kind, load_autoencoder(vae), 28, seed=0)
    with pytest.raises(UserError, match="--init must be a pipeline whose") as caught:
        load_weights(network, Path(other))
    assert "\n" not in str(caught.value)


def test_labels_of_another_data_set(data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = read_split(data, "train")
    monkeypatch.setattr(latent, "read_split", lambda *_: (images, labels + 9))
    with pytest.raises(UserError, match=r"expected labels 0..9 in .*, got 10"):
        main(data, vae, tmp_path, **SETTINGS)


@pytest.mark.slow
def test_commands(data: Path, tmp_path: Path) -> None:
    """Autoencoder, denoiser and score, one after the other, with the shipped architectures."""

    def run(command: str, *options: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", f"tcaq_lightning.zoo.pretraining.{command}", *map(str, options), "--threads", "1"]
        return subprocess.run(line, check=False, capture_output=True, text=True)

    training = ["--data", data, "--steps", 1, "--batch_size", 2]
    done = run("autoencoder", *training, "--output", tmp_path / "vae", "--precision", "bf16-mixed")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 80
    encoder = ["--autoencoder", tmp_path / "vae" / "model", "--latents", tmp_path / "latents"]
    for kind in ("unet", "dit"):
        done = run("latent", *training, *encoder, "--denoiser", kind, "--output", tmp_path / kind)
        assert done.returncode == 0, done.stderr
        model = tmp_path / kind / "model"
        done = run("score", "--model", model, "--num_images", 70, "--steps", "[1]", "--guidance_scale", "[1,2]")
        assert done.returncode == 0, done.stderr
        assert [json.loads(line)["guidance_scale"] for line in done.stdout.splitlines()] == [1.0, 2.0]
    failed = run("latent", *training, "--autoencoder", tmp_path, "--output", tmp_path / "none")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: expected an AutoencoderKL")
    assert failed.stderr.count("\n") == 1
