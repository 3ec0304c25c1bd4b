from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

from tcaq_lightning.__main__ import COMMANDS, main
from tcaq_lightning.artifact.directory import freeze, save_artifact
from tcaq_lightning.backends.open import is_quantized, open_any
from tcaq_lightning.cli.config import default_file
from tcaq_lightning.config import QuantizationConfig, WeightConfig
from tcaq_lightning.evaluation.features import REFERENCE_FILE, FeatureExtractor, save_feature_extractor
from tcaq_lightning.evaluation.images import ImageWriter, open_images
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tcaq_lightning.models.pipelines import find_denoiser
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tests.evaluation.inception_weights import pictures, random_weights


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
    assert quant_layers(find_denoiser(open_any(models["quantized"]))[1])
    assert not quant_layers(find_denoiser(open_any(models["full"]))[1])


@pytest.mark.parametrize("which", ["full", "quantized"])
@pytest.mark.parametrize("scheduler", [None, "UniPCMultistepScheduler"])
def test_sample(which: str, scheduler: str | None, models: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "new" / "grid.png"
    options = [] if scheduler is None else ["--scheduler", scheduler]
    assert (
        run("sample", models[which], "--num", 5, "--num_steps", 2, "--batch_size", 2, "--output", output, *options) == 0
    )
    with Image.open(output) as picture:
        assert picture.size == (3 * 56 + 4, 2 * 56 + 2)


def test_sample_repeats_and_obeys(models: dict[str, str], tmp_path: Path) -> None:
    def pixels(*arguments: object) -> bytes:
        output = tmp_path / "a.png"
        assert run("sample", models["full"], "--num", 4, "--num_steps", 3, "--output", output, *arguments) == 0
        with Image.open(output) as picture:
            return picture.tobytes()

    first = pixels()
    assert pixels("--batch_size", 3) == first
    assert pixels("--seed", 1) != first
    assert pixels("--eta", 1) != first
    assert pixels("--sampler.options.timestep_spacing", "trailing") != first
    assert pixels("--sampler.options", '{"timestep_spacing": "trailing"}') != first


def evaluate(path: str, models: dict[str, str], *arguments: object) -> int:
    sizes = ["--num_images", 4, "--num_trajectories", 2, "--fid_samples", 6, "--num_steps", 2, "--batch_size", 4]
    return run("evaluate", path, "--features", models["features"], *sizes, *arguments)


def test_evaluate_compares(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "metrics.json"
    assert evaluate(models["quantized"], models, "--full", models["full"], "--output", output) == 0
    assert "same-noise image MSE" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert 0 < content["noise_error"]["summary"] < 1
    assert content["same_noise"]["mse"] > 0
    assert content["scores"]["full"]["fid"]["num_samples"] == content["scores"]["quantized"]["fid"]["num_samples"] == 6


@pytest.mark.parametrize("which", ["full", "quantized"])
def test_evaluate_one_model(which: str, models: dict[str, str], tmp_path: Path) -> None:
    output, cache = tmp_path / "metrics.json", tmp_path / "cache"
    assert evaluate(models[which], models, "--output", output, "--cache", cache) == 0
    content = json.loads(output.read_text())
    assert content["noise_error"] is content["same_noise"] is None
    assert list(content["scores"]) == [which]
    assert len(list(cache.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["sample", "/no/such/model"], "/no/such/model"),
        (["evaluate", "/no/such/model"], "/no/such/model"),
        (["sample", "FULL", "--scheduler", "NoScheduler"], "'NoScheduler'"),
        (["sample", "FULL", "--num", "-3"], "--num must be at least 1, got -3"),
        (["sample", "FULL", "--num_steps", "0"], "sampler.num_steps must be at least 1, got 0"),
        (["sample", "FULL", "--eta", "2"], "eta"),
        (["sample", "FULL", "--num", "many"], "many"),
        (["sample", "FULL", "--threads", "0"], "--threads"),
        (["sample", "FULL", "--options.clip_sample", "false"], "can mean --sampler.options.clip_sample or --cond"),
        (["sample", "FULL", "--steps", "1"], "unknown option --steps; expected one such as --num_steps"),
        (["sample", "FULL", "--backend", "abacus"], "abacus"),
        (["sample", "FULL", "--extensions", "/no/file.py"], "extensions[0]: expected a Python file"),
        (["evaluate", "FULL", "--extensions", "no.module"], "extensions[0]: no.module cannot be imported"),
        (["evaluate", "FULL", "--sampler.num_steps", "0"], "evaluation.sampler.num_steps must be at least 1, got 0"),
        (["evaluate", "FULL", "--devices", "0"], "trainer.devices must be at least 1"),
        (["sample", "FULL", "--sampler.options.no_such", "1"], "no_such"),
        (["sample", "FULL", "--bogus", "1"], "--bogus"),
        (["sample", "FULL", "--output", "FULL/model_index.json/a.png"], "model_index.json"),
        (["sample", "FULL", "--output", "FULL"], "--output: expected a file"),
        (["sample"], "path"),
        (["paint"], "paint"),
        ([], "subcommand"),
        (["evaluate", "FULL", "--fid_samples", "0"], "nothing to measure"),
        (["evaluate", "FULL", "--fid_samples", "-1"], "--fid_samples must be at least 0"),
        (["evaluate", "FULL", "--features", "/nowhere"], "/nowhere"),
        (["evaluate", "FULL", "--full", "OTHER"], "'sample_size': 16"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], text: str, models: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = {"sample": ["--output", tmp_path / "a.png", "--num", 1, "--num_steps", 1]}
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


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_screen_and_shows_an_example(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*([] if command is None else [command]), "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert lines[-2] == "example:"
    assert lines[-1].startswith(f"  python -m tcaq_lightning {command or ''}")


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"config", "convert", "compare"}))
def test_commands_that_open_something_take_extensions(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", "x"] if command == "sample" else ["x.safetensors"] * (command in {"statistics", "export"})
    assert main([command, str(tmp_path), *output, "--extensions", "/no/such/file.py"]) == 2
    assert "extensions[0]: expected a Python file" in capsys.readouterr().err


def test_all_options_are_described_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sample", "--help_all") == 0
    assert "DDIM's noise share" in capsys.readouterr().out


def test_config_prints_all_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config") == 0
    assert capsys.readouterr().out == default_file()


def test_interrupt(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tcaq_lightning.models.sampling.LoopSampling.sample", interrupt)
    assert run("sample", models["full"]) == 130


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random Inception weights, two folders of grey pictures, and one with a broken one."""
    root = tmp_path_factory.mktemp("protocol")
    torch.save(random_weights(), root / "weights.pth")
    for seed, name in enumerate(("fake", "real", "broken")):
        ImageWriter(root / name, "test").write(range(8), pictures(8, size=8, channels=1, seed=seed))
    path = root / "broken" / "000006.png"
    path.write_bytes(path.read_bytes()[:60])
    return {"weights": root / "weights.pth"} | {name: root / name for name in ("fake", "real", "broken")}


def test_images_against_statistics(
    protocol: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tcaq_lightning.evaluation.inception.INPUT_SIZE", 75)
    weights = ["--inception_weights", protocol["weights"]]
    statistics, output = tmp_path / "real.safetensors", tmp_path / "metrics.json"
    assert (
        run("statistics", protocol["real"], statistics, *weights, "--num_features", 5, "--cache", tmp_path / "c") == 0
    )
    assert statistics.is_file()
    assert capsys.readouterr().out == ""
    options = ["--features", "inception", *weights, "--reference", statistics, "--output", output]
    metrics = ["--metrics", "fid,sfid,is,kid,precision_recall", "--is_splits", 2, "--kid_subset_size", 4]
    assert run("evaluate", protocol["fake"], *options, *metrics, "--batch_size", 3) == 0
    table = capsys.readouterr().out
    for name in ("FID, images", "sFID, images", "IS, images", "KID, images", "precision, recall, images"):
        assert name in table
    content = json.loads(output.read_text())
    assert content["scores"]["images"]["fid"]["num_samples"] == 8
    assert content["images"] == str(protocol["fake"])
    assert content["protocol"]["checksum"]


def test_samples_are_saved_and_measured_again(models: dict[str, str], tmp_path: Path) -> None:
    outputs = [tmp_path / f"{i}.json" for i in range(2)]
    assert evaluate(models["quantized"], models, "--save_images", tmp_path / "out", "--output", outputs[0]) == 0
    assert len(open_images(tmp_path / "out", "path")) == 6
    assert run("evaluate", tmp_path / "out", "--features", models["features"], "--output", outputs[1]) == 0
    sampled, written = (json.loads(o.read_text())["scores"] for o in outputs)
    # An own extractor sees samples before they are rounded to bytes.
    assert written["images"]["fid"]["value"] == pytest.approx(sampled["quantized"]["fid"]["value"], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["evaluate", "FAKE", "--metrics", "fid,beauty"], "evaluation.metrics"),
        (["evaluate", "FAKE", "--metrics", "is"], "evaluation.features must be inception for is"),
        (["evaluate", "FAKE", "--metrics", "clip"], "evaluation.clip_model"),
        (["evaluate", "FAKE", "--metrics", "clip", "--clip_model", "x", "--clip_prompts", "/no/p"], "/no/p"),
        (["evaluate", "FAKE", "--features", "inception", "--inception_weights", "/no/w.pth"], "/no/w.pth"),
        (["evaluate", "FAKE", "--features", "FEATURES", "--reference", "NOTHING"], "got none"),
        (["evaluate", "FAKE", "--features", "FEATURES", "--reference", "/no/r.npz"], "/no/r.npz"),
        (["evaluate", "FAKE", "--full", "x"], "--full"),
        (["evaluate", "NOTHING"], "got none"),
        (["evaluate", "BROKEN", "--features", "FEATURES"], "000006.png"),
        (["statistics", "BROKEN", "OUT.safetensors", "--features", "FEATURES"], "000006.png"),
        (["statistics", "FAKE", "OUT.npz", "--features", "FEATURES"], ".safetensors"),
        (["statistics", "/no/images", "OUT.safetensors", "--features", "FEATURES"], "/no/images"),
    ],
)
def test_mistakes_about_images_are_one_line_and_exit_2(
    arguments: list[str],
    text: str,
    models: dict[str, str],
    protocol: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"FAKE": protocol["fake"], "BROKEN": protocol["broken"], "FEATURES": models["features"]}
    names |= {
        "NOTHING": tmp_path / "empty",
        "OUT.safetensors": tmp_path / "o.safetensors",
        "OUT.npz": tmp_path / "o.npz",
    }
    assert run(*(names.get(a, a) for a in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert text in err
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(protocol: dict[str, Path], models: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}

    def command(*arguments: object) -> tuple[int, str]:
        line = [sys.executable, "-m", "tcaq_lightning", *map(str, arguments)]
        ended = subprocess.run(line, check=False, capture_output=True, text=True, env=environment, timeout=600)
        return ended.returncode, ended.stderr

    weights = ["--inception_weights", protocol["weights"], "--batch_size", 3, "--threads", 1]
    metrics = ["--metrics", "fid,sfid,is,kid,precision_recall", "--is_splits", 2, "--kid_subset_size", 4]
    contents = []
    statistics = tmp_path / "real.safetensors"
    assert command("statistics", protocol["real"], statistics, *weights, "--devices", 2) == (0, "")
    for devices, reference in ((1, protocol["real"]), (2, statistics)):
        output = tmp_path / f"{devices}.json"
        options = ["--features", "inception", "--reference", reference, "--output", output, "--devices", devices]
        code, err = command("evaluate", protocol["fake"], *options, *weights, *metrics)
        assert code == 0
        assert err.count("8 samples by 2048 features") == 1  # said once, by the first rank
        contents.append(json.loads(output.read_text()))
        del contents[-1]["seconds"], contents[-1]["protocol"]["reference"]
    assert contents[0] == contents[1]

    # Samples, too; and a picture that only the second rank comes across.
    samples = [
        "--features",
        models["features"],
        "--num_steps",
        2,
        "--fid_samples",
        6,
        "--batch_size",
        3,
        "--threads",
        1,
    ]
    for devices in (1, 2):
        saved = ["--save_images", tmp_path / f"pictures{devices}", "--output", tmp_path / "m.json"]
        assert command("evaluate", models["full"], *samples, *saved, "--devices", devices) == (0, "")
        contents.append(json.loads((tmp_path / "m.json").read_text())["scores"])
    assert contents[2] == contents[3]
    one, two = (open_images(tmp_path / f"pictures{n}", "path").read(range(6)) for n in (1, 2))
    assert torch.equal(one, two)
    code, err = command(
        "evaluate", protocol["broken"], "--features", models["features"], "--batch_size", 4, "--devices", 2
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "000006.png" in err
