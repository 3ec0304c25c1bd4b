"""Whatever is wrong with what the user gave: one line that says so, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.train.conftest import Command, Ended, Settings, changed, contents

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def assert_refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, (ended.code, ended.err)
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("error: ")
    assert len(ended.err) < 700
    assert "Traceback" not in ended.out
    for word in words:
        assert word in ended.err, ended.err


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sede", 1, ["sede", "seed"]),
        ("tcr.enable", True, ["tcr.enable", "enabled"]),
        ("reconstruction.iteration", None, ["reconstruction.iteration"]),
        ("quantization.rules", [{"pattern": "*", "bits": 4}], ["quantization.rules[0].bits"]),
        ("quantization.rules", [{"pattern": "conv_*", "weight_bits": 9}], ["rules[conv_*].weight_bits", "2..8", "9"]),
        ("quantization.rules", [{"pattern": "nothing.*"}], ["quantization.rules", "nothing.*"]),
        ("quantization.weight.bits", "four", ["quantization.weight.bits", "four"]),
        ("quantization.weight.bits", 1, ["quantization.weight.bits", "2..8", "1"]),
        ("quantization.weight.bits", 4.5, ["quantization.weight.bits", "4.5"]),
        ("quantization.activation.timestep_groups", 4, ["timestep_groups", "num_steps", "3", "4"]),
        ("seed", -1, ["seed", "-1"]),
        ("par.rounds", 0, ["par.rounds", "at least 1", "0"]),
        ("tcr.truncation", 0.5, ["tcr.truncation", "0.5"]),
        ("tcr.truncation", float("nan"), ["tcr.truncation", "nan"]),
        ("daq.rule", "best", ["daq.rule", "best", "likelihood"]),
        ("reconstruction.iterations", 2, ["reconstruction.iterations", "2"]),
        ("model.path", "/nowhere/model", ["model.path", "/nowhere/model"]),
        ("model.path", "nowhere", ["model.path", "nowhere"]),
        ("model.path", "", ["model.path"]),
        ("calibration.sampler.scheduler", "DDIM", ["calibration.sampler.scheduler", "DDIM"]),
        ("calibration.sampler.scheduler", "UNet2DModel", ["calibration.sampler.scheduler", "UNet2DModel"]),
        ("calibration.sampler.options", {"clip": 1}, ["calibration.sampler.options", "clip"]),
        ("calibration.sampler.options", {"timestep_spacing": "even"}, ["calibration.sampler", "even"]),
        ("calibration.sampler.num_steps", 101, ["calibration.sampler", "101"]),
        ("evaluation.sampler", {"scheduler": "Nothing"}, ["evaluation.sampler.scheduler", "Nothing"]),
        ("evaluation.sampler", {"num_steps": 101}, ["evaluation.sampler", "101"]),
        ("evaluation", {"fid_samples": 500, "features": "/nowhere"}, ["feature extractor", "/nowhere"]),
        ("evaluation.fid_samples", 3, ["evaluation.fid_samples", "3"]),
        ("trainer.accelerator", "abacus", ["trainer.accelerator", "abacus"]),
        pytest.param(
            "trainer.accelerator",
            "gpu",
            ["trainer.accelerator", "gpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_settings(command: Command, settings: Settings, tmp_path: Path, key: str, value: Any, words: list[str]) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(yaml.safe_dump(changed(settings, key, value)))
    assert_refused(command("--config", config, "--run_dir", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--sede", "1"], ["--sede"]),
        (["--seed"], ["seed"]),
        (["--seed", "x"], ["seed", "x"]),
        (["--quantization.weight.bits", "9"], ["quantization.weight.bits", "2..8", "9"]),
        (["--config", "/nowhere.yaml"], ["/nowhere.yaml"]),
        (["--config", "/"], ["--config /"]),
        (["stray"], ["stray"]),
    ],
)
def test_arguments(command: Command, config: Path, tmp_path: Path, args: list[str], words: list[str]) -> None:
    assert_refused(command("--config", config, "--run_dir", tmp_path / "run", *args), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "seed", "[1]", "seed: [", "a: \x00"])
def test_no_yaml(command: Command, tmp_path: Path, text: str) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(text)
    assert_refused(command("--config", config, "--run_dir", tmp_path / "run"), str(config))
    assert not (tmp_path / "run").exists()


def weights(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, {"format": "pt"})

    return apply


def config_of_model(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        file = model / "unet" / "config.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


def index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        file = model / "model_index.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (weights(lambda t: t.pop("conv_in.bias")), ["missing", "conv_in.bias"]),
        (weights(lambda t: t.update(extra=torch.zeros(1))), ["unexpected", "extra"]),
        (weights(lambda t: t.update({"conv_in.bias": torch.zeros(3)})), ["conv_in.bias"]),
        (weights(lambda t: t["conv_in.bias"].fill_(float("nan"))), ["NaN", "conv_in.bias"]),
        (weights(lambda t: t["conv_in.bias"][0].fill_(float("inf"))), ["infinite", "conv_in.bias"]),
        (lambda m: (m / WEIGHTS).write_bytes((m / WEIGHTS).read_bytes()[:-100]), []),
        (lambda m: (m / WEIGHTS).write_bytes(b""), []),
        (lambda m: (m / WEIGHTS).unlink(), []),
        (lambda m: (m / "unet" / "config.json").unlink(), []),
        (lambda m: (m / "unet" / "config.json").write_text("{"), []),
        (lambda m: shutil.rmtree(m / "scheduler"), ["scheduler"]),
        (lambda m: (m / "model_index.json").unlink(), ["model_index.json"]),
        (lambda m: (m / "model_index.json").write_text("{"), ["model_index.json"]),
        (index(lambda c: c.pop("unet")), ["denoiser"]),
        (index(lambda c: c.update(unet=["diffusers", "NoSuchModel"])), ["NoSuchModel"]),
        (config_of_model(lambda c: c.update(in_channels=3)), []),
    ],
)
def test_models(
    command: Command,
    settings: Settings,
    model: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    words: list[str],
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    damage(damaged)
    config = tmp_path / "wrong.yaml"
    config.write_text(yaml.safe_dump(changed(settings, "model.path", str(damaged))))
    assert_refused(command("--config", config, "--run_dir", tmp_path / "run"), "model.path", str(damaged), *words)
    assert not (tmp_path / "run").exists()


BLOCK = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
PLAIN = BLOCK | {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
CROSS = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UNet2DModel(**PLAIN, num_class_embeds=3), ["class-conditional"]),
        (
            lambda: UNet2DConditionModel(**BLOCK, **CROSS, cross_attention_dim=8),
            ["model.path", "encoder_hidden"],
        ),
        (lambda: UNet2DModel(**PLAIN | {"out_channels": 2}), ["model.path", "(2, 2, 8, 8)", "(2, 1, 8, 8)"]),
        (lambda: UNet2DModel(**PLAIN | {"in_channels": 3}), ["model.path", "(2, 1, 8, 8)", "(2, 3, 8, 8)"]),
        (lambda: UNet2DModel(**PLAIN | {"sample_size": None}), ["model.path"]),
        # its logarithm of t = 0 is infinite
        (lambda: UNet2DModel(**PLAIN, time_embedding_type="fourier"), ["calibration.sampler", "NaN"]),
    ],
    ids=["classes", "text", "channels", "inpainting", "size", "diverging"],
)
def test_unsupported_denoisers(
    command: Command, settings: Settings, tmp_path: Path, make: Callable[[], Any], words: list[str]
) -> None:
    pipeline = DDIMPipeline(make(), DDIMScheduler(num_train_timesteps=100))
    pipeline.save_pretrained(tmp_path / "model")
    config = tmp_path / "wrong.yaml"
    config.write_text(yaml.safe_dump(changed(settings, "model.path", str(tmp_path / "model"))))
    assert_refused(command("--config", config, "--run_dir", tmp_path / "run"), *words)


def test_directory_of_something_else(command: Command, config: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    assert_refused(command("--config", config, "--run_dir", tmp_path), "run_dir", str(tmp_path))
    assert_refused(command("--config", config, "--run_dir", tmp_path / "thesis.txt"), "run_dir", "thesis.txt")
    assert_refused(command("--config", config, "--run_dir", tmp_path / "thesis.txt" / "run"), "thesis.txt")
    assert contents(tmp_path) == before


def test_directory_in_proc(command: Command, config: Path) -> None:
    assert_refused(command("--config", config, "--run_dir", "/proc/run"), "/proc/run")


@pytest.mark.parametrize("limit", [6_000, 12_000])
def test_full_disk(command: Command, config: Path, undisturbed: Path, tmp_path: Path, limit: int) -> None:
    """A limit on the size of files fails as a full disk does; with more room the run goes on."""
    run_dir = tmp_path / "run"
    ended = command("--config", config, "--run_dir", run_dir, limit=limit)
    assert_refused(ended, str(run_dir))
    assert not list(tmp_path.rglob(".*"))
    if limit == 12_000:
        assert command("--config", config, "--run_dir", run_dir).code == 0
        assert contents(run_dir / "quantized") == contents(undisturbed / "quantized")


def test_full_disk_for_curves(command: Command, config: Path, tmp_path: Path) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run", "--logging.tensorboard", "true")
    ended = command(*args, limit=40_000)
    assert_refused(ended, str(tmp_path / "run"))


def test_two_commands_at_once(command: Command, config: Path, almost_done: Path) -> None:
    import fcntl
    import os

    descriptor = os.open(almost_done, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    before = contents(almost_done)
    try:
        assert_refused(command("--config", config, "--run_dir", almost_done), "another command", str(almost_done))
    finally:
        os.close(descriptor)
    assert contents(almost_done) == before
