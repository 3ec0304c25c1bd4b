from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

from tcaq_lightning.__main__ import is_quantized, main, open_model
from tcaq_lightning.artifact import freeze, save_artifact
from tcaq_lightning.config import QuantizationConfig, WeightConfig
from tcaq_lightning.evaluation.features import REFERENCE_FILE, FeatureExtractor, save_feature_extractor
from tcaq_lightning.evaluation.fid import ReferenceStatistics
from tcaq_lightning.pipelines import find_denoiser
from tcaq_lightning.quantize import quant_layers, quantize, quantizers
from tcaq_lightning.timesteps import TimestepGroups


def pipeline(size: int = 8) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=size,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
    return DDIMPipeline(unet=unet.requires_grad_(False).eval(), scheduler=DDIMScheduler(clip_sample=False))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of a full-precision model, of it quantized, of one of another size, and of an extractor."""
    root = tmp_path_factory.mktemp("models")
    paths = {name: str(root / name) for name in ("full", "quantized", "other", "features")}
    pipeline().save_pretrained(paths["full"])
    pipeline(16).save_pretrained(paths["other"])
    quantized = pipeline()
    quantize(quantized.unet, QuantizationConfig(weight=WeightConfig(bits=8)), TimestepGroups([500.0]))
    for quantizer in quantizers(quantized.unet).values():
        quantizer.delta.fill_(0.05)
        if hasattr(quantizer, "zero_point"):
            quantizer.zero_point.fill_(128)
    for layer in quant_layers(quantized.unet).values():
        layer.learned_weight.search(layer.input_quantizer.r)
    freeze(quantized.unet)
    save_artifact(quantized, "unet", quantized.unet, paths["quantized"], {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        extractor = FeatureExtractor((4, 4, 4), num_features=4, num_groups=2)
        features = extractor(torch.rand(50, 1, 8, 8) * 2 - 1)
    save_feature_extractor(extractor, Path(paths["features"]), {})
    ReferenceStatistics.from_features(features.detach()).save(Path(paths["features"]) / REFERENCE_FILE)
    return paths


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_tells_artifacts_from_models(models: dict[str, str]) -> None:
    assert is_quantized(models["quantized"])
    assert not is_quantized(models["full"])
    assert not is_quantized("fashion-mnist-ddpm")
    assert quant_layers(find_denoiser(open_model(models["quantized"]))[1])
    assert not quant_layers(find_denoiser(open_model(models["full"]))[1])


@pytest.mark.parametrize("which", ["full", "quantized"])
@pytest.mark.parametrize("scheduler", [None, "UniPCMultistepScheduler"])
def test_sample(which: str, scheduler: str | None, models: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "new" / "grid.png"
    options = [] if scheduler is None else ["--scheduler", scheduler]
    assert run("sample", models[which], "--num", 5, "--steps", 2, "--batch_size", 2, "--output", output, *options) == 0
    with Image.open(output) as picture:
        assert picture.size == (3 * 56 + 4, 2 * 56 + 2)


def test_sample_repeats_and_obeys(models: dict[str, str], tmp_path: Path) -> None:
    def pixels(*arguments: object) -> bytes:
        output = tmp_path / "a.png"
        assert run("sample", models["full"], "--num", 4, "--steps", 3, "--output", output, *arguments) == 0
        with Image.open(output) as picture:
            return picture.tobytes()

    first = pixels()
    assert pixels("--batch_size", 3) == first
    assert pixels("--seed", 1) != first
    assert pixels("--eta", 1) != first
    assert pixels("--options.timestep_spacing", "trailing") != first
    assert pixels("--options", '{"timestep_spacing": "trailing"}') != first


def evaluate(path: str, models: dict[str, str], *arguments: object) -> int:
    sizes = ["--num_images", 4, "--num_trajectories", 2, "--fid_samples", 6, "--steps", 2, "--batch_size", 4]
    return run("evaluate", path, "--features", models["features"], *sizes, *arguments)


def test_evaluate_compares(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "metrics.json"
    assert evaluate(models["quantized"], models, "--full", models["full"], "--output", output) == 0
    assert "same-noise image MSE" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert 0 < content["noise_error"]["summary"] < 1
    assert content["same_noise"]["mse"] > 0
    assert content["fid"]["full"]["num_samples"] == content["fid"]["quantized"]["num_samples"] == 6


@pytest.mark.parametrize("which", ["full", "quantized"])
def test_evaluate_one_model(which: str, models: dict[str, str], tmp_path: Path) -> None:
    output, cache = tmp_path / "metrics.json", tmp_path / "cache"
    assert evaluate(models[which], models, "--output", output, "--cache", cache) == 0
    content = json.loads(output.read_text())
    assert content["noise_error"] is content["same_noise"] is None
    assert [name for name, fid in content["fid"].items() if fid] == [which]
    assert len(list(cache.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["sample", "/no/such/model"], "/no/such/model"),
        (["evaluate", "/no/such/model"], "/no/such/model"),
        (["sample", "FULL", "--scheduler", "NoScheduler"], "'NoScheduler'"),
        (["sample", "FULL", "--num", "-3"], "--num must be at least 1, got -3"),
        (["sample", "FULL", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["sample", "FULL", "--eta", "2"], "eta"),
        (["sample", "FULL", "--num", "many"], "many"),
        (["sample", "FULL", "--threads", "0"], "--threads"),
        (["sample", "FULL", "--options.no_such", "1"], "no_such"),
        (["sample", "FULL", "--bogus", "1"], "--bogus"),
        (["sample", "FULL", "--output", "FULL/model_index.json/a.png"], "model_index.json"),
        (["sample", "FULL", "--output", "FULL"], "--output: expected a file"),
        (["sample"], "path"),
        (["paint"], "paint"),
        ([], "subcommand"),
        (["evaluate", "FULL", "--fid_samples", "0"], "nothing to measure"),
        (["evaluate", "FULL", "--fid_samples", "-1"], "--fid_samples must be at least 0"),
        (["evaluate", "FULL", "--features", "/nowhere"], "/nowhere"),
        (["evaluate", "FULL", "--full", "OTHER"], "(1, 16, 16)"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], text: str, models: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = {"sample": ["--output", tmp_path / "a.png", "--num", 1, "--steps", 1]}
    names = {"FULL": models["full"], "OTHER": models["other"]}
    given = [a.replace("FULL", names["FULL"]).replace("OTHER", names["OTHER"]) for a in arguments]
    command, rest = given[:1], given[1:]
    path, options = rest[:1], rest[1:]
    # Later options win: the mistake under test comes last.
    extra = small.get(command[0], []) if command and path else []
    assert run(*command, *path, *extra, *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert text in err
    assert list(tmp_path.iterdir()) == []


def test_damaged_config_is_named(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{")
    assert run("sample", tmp_path) == 2
    assert str(tmp_path / "unet" / "config.json") in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sample", "--help") == 0
    assert "DDIM's noise share" in capsys.readouterr().out


def test_interrupt(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tcaq_lightning.pipelines.sample", interrupt)
    assert run("sample", models["full"]) == 130
