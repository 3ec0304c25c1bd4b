from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors.torch import load_file

from tcaq_lightning.errors import UserError
from tcaq_lightning.zoo.pretraining.denoiser import DenoiserPretraining, export, initial_model, pretrain
from tcaq_lightning.zoo.pretraining.idx import read_split
from tcaq_lightning.zoo.pretraining.training import Recipe
from tests.tiny_models import without_attention
from tests.zoo.pretraining.conftest import killed

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
RECIPE = Recipe(steps=4, batch_size=8, lr=1e-3, warmup=2, seed=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory with a network of a few thousand weights."""
    directory = tmp_path_factory.mktemp("tiny")
    export(without_attention(28), DDIMScheduler(num_train_timesteps=1000), directory)
    return directory


def test_resumed_run_equals_uninterrupted_run(data: Path, tiny: Path, tmp_path: Path) -> None:
    whole = pretrain(data, tmp_path / "whole", RECIPE, tiny, save_every=2)
    with killed(DenoiserPretraining, 3):
        pretrain(data, tmp_path / "parts", RECIPE, tiny, save_every=2)
    half = load_file(tmp_path / "parts" / "model" / WEIGHTS)
    parts = pretrain(data, tmp_path / "parts", RECIPE, tiny, save_every=2)

    expected, resumed = load_file(whole / WEIGHTS), load_file(parts / WEIGHTS)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())
    assert any(not torch.equal(half[key], value) for key, value in expected.items())
    first = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["state_dict"]
    second = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(second[key], value) for key, value in first.items())


def test_finished_run_is_left_as_it_is_and_another_recipe_refused(data: Path, tiny: Path, tmp_path: Path) -> None:
    model = pretrain(data, tmp_path, RECIPE, tiny, save_every=3)
    before = load_file(model / WEIGHTS)
    pretrain(data, tmp_path, RECIPE, tiny, save_every=3)
    assert all(torch.equal(before[key], value) for key, value in load_file(model / WEIGHTS).items())
    with pytest.raises(UserError, match=r"--lr 0.01 was given, but the run in --output has 0.001"):
        pretrain(data, tmp_path, Recipe(steps=4, batch_size=8, lr=0.01, warmup=2, seed=3), tiny)


def test_exported_weights_are_the_average_of_the_iterates(data: Path, tiny: Path, tmp_path: Path) -> None:
    iterates: list[dict[str, torch.Tensor]] = []

    class Recorder(DenoiserPretraining):
        def optimizer_step(self, *args: object, **kwargs: object) -> None:
            super().optimizer_step(*args, **kwargs)
            iterates.append({key: value.detach().clone() for key, value in self.network.named_parameters()})

    expected = dict(load_file(tiny / WEIGHTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcaq_lightning.zoo.pretraining.denoiser.DenoiserPretraining", Recorder)
        model = pretrain(data, tmp_path, RECIPE, tiny)
    for i, weights in enumerate(iterates, start=1):
        decay = min(RECIPE.ema_decay, (1 + i) / (10 + i))
        expected = {key: decay * value + (1 - decay) * weights[key] for key, value in expected.items()}
    torch.testing.assert_close(load_file(model / WEIGHTS), expected)
    assert len(iterates) == RECIPE.steps


def test_learns(data: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = read_split(data, "train")
    network, scheduler = initial_model(tiny, seed=0)
    module = DenoiserPretraining(network, scheduler, images, Recipe(steps=40, batch_size=16, lr=3e-3))
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    optimizer = torch.optim.AdamW(module.network.parameters(), lr=3e-3)
    losses = []
    for i in range(40):
        optimizer.zero_grad()
        loss = module.training_step(i, i)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_export_opens_as_a_pipeline(data: Path, tmp_path: Path) -> None:
    network, scheduler = initial_model(None, seed=1)
    assert sum(p.numel() for p in network.parameters()) == 1_623_169
    export(network, scheduler, tmp_path / "model")
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "model", use_safetensors=True, low_cpu_mem_usage=False)
    assert pipeline.scheduler.config.beta_schedule == "linear"
    for key, value in network.state_dict().items():
        assert torch.equal(pipeline.unet.state_dict()[key], value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export(pipeline.unet, pipeline.scheduler, tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "unet" / "config.json").read_text()


def test_from_scratch_has_the_architecture_of_the_shipped_model() -> None:
    shipped = Path(__file__).parents[3] / "tcaq_lightning" / "models" / "assets" / "fashion-mnist-ddpm"
    ours, our_scheduler = initial_model(None, seed=0)
    theirs, their_scheduler = initial_model(shipped, seed=0)

    def settings(config: dict[str, object]) -> dict[str, object]:
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in config.items()
            if not key.startswith("_")
        }

    assert settings(ours.config) == settings(theirs.config)
    assert settings(our_scheduler.config) == settings(their_scheduler.config)


def test_bad_initial_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--init must be a diffusers directory") as caught:
        initial_model(tmp_path, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_command(data: Path, tiny: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tcaq_lightning.zoo.pretraining.denoiser",
        "--data",
        str(data),
        "--init",
        str(tiny),
    ]
    command += ["--output", str(tmp_path), "--steps", "2", "--batch_size", "4", "--threads", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / WEIGHTS).exists()
    assert list((tmp_path / "tensorboard").glob("events*"))
    command[command.index("--data") + 1] = str(tmp_path)
    failed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: expected an IDX file")
    assert failed.stderr.count("\n") == 1
