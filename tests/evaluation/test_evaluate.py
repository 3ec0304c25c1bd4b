from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import nn

from tcaq_lightning.config import EvaluationConfig, SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation import evaluate as module
from tcaq_lightning.evaluation.evaluate import IMAGES_START, Evaluation, evaluate, evaluate_images, planned_samples
from tcaq_lightning.evaluation.features import REFERENCE_FILE, load_feature_extractor
from tcaq_lightning.evaluation.images import ImageWriter, open_images, to_pixels
from tcaq_lightning.evaluation.metrics.fid import frechet_distance
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tcaq_lightning.models.sampling import LoopSampling
from tests.evaluation.inception_weights import pictures

SAMPLER = SamplerConfig(num_steps=2, options={"clip_sample": False})
SAMPLING = LoopSampling(DDIMScheduler())


def unet(channels: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            add_attention=False,
        )
    frozen: nn.Module = model.requires_grad_(False).eval()
    return frozen


def altered(model: nn.Module, factor: float = 1.05) -> nn.Module:
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.mul_(factor)
    return other


def config(features_dir: Path, **changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {"num_trajectories": 3, "num_images": 5, "fid_samples": 8, "batch_size": 3}
    return EvaluationConfig(**{**values, "features": str(features_dir), **changes})


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Numbers of the noises of every call of the sampler for images."""
    calls: list[list[int]] = []

    original = LoopSampling.sample

    def spy(self: Any, denoiser: Any, sampler: Any, indices: Any, seed: int) -> Any:
        if indices[0] >= IMAGES_START:
            calls.append(list(indices))
        return original(self, denoiser, sampler, indices, seed)

    monkeypatch.setattr(LoopSampling, "sample", spy)
    return calls


def without_seconds(metrics: Evaluation) -> dict[str, Any]:
    return {k: v for k, v in metrics.to_dict().items() if k != "seconds"}


def test_agrees_with_direct_computation(features_dir: Path, sampled: list[list[int]]) -> None:
    full, quantized = unet(), altered(unet())
    counts: list[int] = []
    settings = config(features_dir)
    metrics = evaluate(full, quantized, SAMPLING, SAMPLER, settings, seed=1, advance=counts.append)
    assert sum(counts) == planned_samples(settings) == 3 + 2 * 8
    # Each noise once for each model: FID and the same-noise images share samples.
    assert sorted(i for call in sampled for i in call) == sorted(2 * list(range(IMAGES_START, IMAGES_START + 8)))

    indices = range(IMAGES_START, IMAGES_START + 8)
    f, q = (SAMPLING.sample(m, SAMPLER, indices, seed=1) for m in (full, quantized))
    assert metrics.images is not None
    assert metrics.images.mse_unclipped == pytest.approx(float((f[:5] - q[:5]).square().mean()), rel=1e-4)
    torch.testing.assert_close(metrics.full_samples, f[:5])
    torch.testing.assert_close(metrics.quantized_samples, q[:5])
    reference = ReferenceStatistics.load(features_dir / REFERENCE_FILE)
    expected = frechet_distance(load_feature_extractor(features_dir)(q), reference)
    assert metrics.scores["quantized"]["fid"]["value"] == pytest.approx(expected.value, rel=1e-3)
    assert metrics.scores["quantized"]["fid"]["num_samples"] == 8
    assert metrics.scores["full"] != metrics.scores["quantized"]


def test_dictionary_is_json(features_dir: Path) -> None:
    model = unet()
    metrics = evaluate(model, model, SAMPLING, SAMPLER, config(features_dir), seed=0)
    values = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert values["noise_error"]["summary"] == 0
    assert len(values["noise_error"]["timesteps"]) == len(values["noise_error"]["bias"]) == 2
    assert values["same_noise"] == {
        **dict.fromkeys(("mse", "mse_median", "mse_worst", "mse_unclipped"), 0),
        **dict.fromkeys(("psnr", "psnr_median", "psnr_worst")),
        "num_images": 5,
        "by_image": [0] * 5,
    }
    assert values["noise_error"]["by_trajectory"] == [0] * 3
    assert values["scores"]["full"] == values["scores"]["quantized"]
    assert values["scores"]["full"]["fid"]["num_samples"] == 8
    assert values["sampler"]["num_steps"] == 2
    assert set(values["seconds"]) == {"noise_error", "full_images", "quantized_images", "scores"}


def test_calibration_noise_is_not_met_again(features_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    collect = module.collect
    monkeypatch.setattr(module, "collect", lambda *a: seen.append(a) or collect(*a))
    evaluate(unet(), unet(), SAMPLING, SAMPLER, config(features_dir, fid_samples=0), seed=3)
    held_out = seen[0][3]
    assert min(held_out) > 100_000
    assert max(held_out) < IMAGES_START
    assert seen[0][4] == 3


def test_evaluation_sampler_is_for_images_only(features_dir: Path) -> None:
    settings = config(features_dir, fid_samples=0, sampler=SamplerConfig("UniPCMultistepScheduler", 3))
    metrics = evaluate(unet(), altered(unet()), SAMPLING, SAMPLER, settings, seed=0)
    assert metrics.noise is not None
    assert len(metrics.noise.timesteps) == 2
    assert metrics.sampler["scheduler"] == "UniPCMultistepScheduler"


@pytest.mark.parametrize("which", ["full", "quantized"])
def test_one_model_alone_gets_its_fid(which: str, features_dir: Path) -> None:
    models: dict[str, Any] = {"full": None, "quantized": None, which: unet()}
    counts: list[int] = []
    metrics = evaluate(
        **models,
        sampling=SAMPLING,
        calibration_sampler=SAMPLER,
        config=config(features_dir),
        seed=0,
        advance=counts.append,
    )
    assert sum(counts) == planned_samples(config(features_dir), models=1) == 8
    assert metrics.noise is metrics.images is None
    assert list(metrics.scores) == [which]
    with pytest.raises(UserError, match="nothing to measure"):
        evaluate(None, unet(), SAMPLING, SAMPLER, config(features_dir, fid_samples=0), seed=0)


class KilledError(Exception):
    """Stands for a signal."""


def test_killed_evaluation_goes_on(features_dir: Path, tmp_path: Path, sampled: list[list[int]]) -> None:
    full, quantized, settings = unet(), altered(unet()), config(features_dir)
    expected = evaluate(full, quantized, SAMPLING, SAMPLER, settings, seed=0)
    sampled.clear()
    counts: list[int] = []

    def kill(count: int) -> None:
        counts.append(count)
        if len(counts) == 3:
            raise KilledError

    with pytest.raises(KilledError):
        evaluate(full, quantized, SAMPLING, SAMPLER, settings, 0, tmp_path, kill)
    assert len(sampled) == 2
    resumed = evaluate(full, quantized, SAMPLING, SAMPLER, settings, 0, tmp_path)
    assert len(sampled) == 6
    assert without_seconds(resumed) == without_seconds(expected)
    assert torch.equal(resumed.full_samples, expected.full_samples)  # type: ignore[arg-type]
    again = evaluate(full, quantized, SAMPLING, SAMPLER, settings, 0, tmp_path)
    assert len(sampled) == 6
    assert without_seconds(again) == without_seconds(expected)
    assert again.seconds["full_images"] == pytest.approx(resumed.seconds["full_images"])


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_damaged_batch_is_sampled_again(
    damage: str, features_dir: Path, tmp_path: Path, sampled: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = (None, unet(), SAMPLING, SAMPLER, config(features_dir), 0, tmp_path)
    expected = evaluate(*arguments)
    sampled.clear()
    path = sorted(tmp_path.rglob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"truncated": content[: len(content) // 2], "altered": content, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        result = evaluate(*arguments)
    assert len(sampled) == 1
    assert str(path) in caplog.text
    assert without_seconds(result) == without_seconds(expected)


def test_cache_knows_what_it_holds(features_dir: Path, tmp_path: Path, sampled: list[list[int]]) -> None:
    model = unet()

    def calls(*, model: Any = model, sampler: SamplerConfig = SAMPLER, seed: int = 0, **changes: Any) -> int:
        sampled.clear()
        evaluate(None, model, SAMPLING, sampler, config(features_dir, **changes), seed, tmp_path)
        return len(sampled)

    assert calls() == 3
    assert calls() == 0
    assert calls(fid_samples=9) == 1  # the last batch was not full
    assert calls(model=copy.deepcopy(model)) == 1
    assert calls(model=altered(model)) == 3
    assert calls(seed=1) == 3
    assert calls(sampler=SamplerConfig(num_steps=3)) == 3
    assert calls(batch_size=4) == 2
    # Full-precision batches serve whatever model they are compared with.
    sampled.clear()
    evaluate(model, altered(model, 0.9), SAMPLING, SAMPLER, config(features_dir, num_images=3), 1, tmp_path)
    assert len(sampled) == 3 + 1


def test_diverged_model_has_no_fid(features_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = evaluate(unet(), altered(unet(), float("nan")), SAMPLING, SAMPLER, config(features_dir), seed=0)
    assert list(metrics.scores) == ["full"]
    assert "NaN" in caplog.text
    json.dumps(metrics.to_dict(), allow_nan=False)


def test_mistakes_show_before_anything_is_sampled(features_dir: Path, sampled: list[list[int]]) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"fid_samples": 4}, "fid_samples must be 0 or more than the 4 features"),
        ({"features": "nowhere"}, "nowhere"),
        ({"sampler": SamplerConfig("NoScheduler")}, "evaluation.sampler.scheduler"),
    ]
    for changes, text in cases:
        with pytest.raises(UserError, match=text):
            evaluate(unet(), unet(), SAMPLING, SAMPLER, config(features_dir, **changes), seed=0)
    with pytest.raises(UserError, match="3 channels"):
        evaluate(unet(3), unet(3), SAMPLING, SAMPLER, config(features_dir), seed=0)
    assert sampled == []


def protocol(weights: Path, reference: Path, **changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {
        "num_trajectories": 2,
        "num_images": 2,
        "fid_samples": 5,
        "batch_size": 3,
        "features": "inception",
        "inception_weights": str(weights),
        "reference": str(reference),
        "metrics": ["fid", "sfid", "is", "kid", "precision_recall"],
        "is_splits": 1,
        "kid_subsets": 2,
        "kid_subset_size": 4,
    }
    return EvaluationConfig(**values | changes)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A folder of RGB pictures."""
    ImageWriter(tmp_path / "real", "test").write(range(6), pictures(6, size=8))
    return tmp_path / "real"


def test_published_protocol_and_its_pictures(
    small_inception: Path, reference: Path, tmp_path: Path, sampled: list[list[int]]
) -> None:
    """What is measured on samples is what is measured on the pictures that they are written as."""
    full, quantized = unet(3), altered(unet(3))
    settings = protocol(small_inception, reference, save_images=str(tmp_path / "pictures"))
    metrics = evaluate(full, quantized, SAMPLING, SAMPLER, settings, 1, tmp_path / "cache")
    values = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert set(values["scores"]) == {"full", "quantized"}
    assert values["scores"]["full"]["fid"]["low"] is None  # too few images for an interval
    assert values["protocol"]["features"] == "inception"
    written = open_images(tmp_path / "pictures" / "quantized", "path")
    samples = SAMPLING.sample(quantized, SAMPLER, range(IMAGES_START, IMAGES_START + 5), seed=1)
    assert torch.equal(written.read(range(5)), to_pixels(samples))
    settings.save_images = None
    again = evaluate_images(written, settings, 1).to_dict()
    assert again["scores"]["images"] == values["scores"]["quantized"]

    # A picture that is gone is drawn again, with its batch; the cache serves the others.
    settings.save_images = str(tmp_path / "pictures")
    lost = tmp_path / "pictures" / "full" / "000004.png"
    content = lost.read_bytes()
    lost.unlink()
    sampled.clear()
    repeated = evaluate(full, quantized, SAMPLING, SAMPLER, settings, 1, tmp_path / "cache")
    assert sampled == [[IMAGES_START + 3, IMAGES_START + 4]]
    assert lost.read_bytes() == content
    assert without_seconds(repeated) == without_seconds(metrics)
    with pytest.raises(UserError, match="save_images"):
        evaluate(full, altered(unet(3), 0.9), SAMPLING, SAMPLER, settings, 1, tmp_path / "cache")


def test_channels_that_are_no_picture(small_inception: Path, reference: Path, sampled: list[list[int]]) -> None:
    with pytest.raises(UserError, match="4 channels"):
        evaluate(None, unet(4), SAMPLING, SAMPLER, protocol(small_inception, reference), 0)
    assert sampled == []


def test_diverged_model_has_no_scores(small_inception: Path, reference: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = protocol(small_inception, reference, metrics=["fid", "is"])
    metrics = evaluate(None, altered(unet(3), float("nan")), SAMPLING, SAMPLER, settings, 0)
    assert metrics.scores == {}
    assert "FID, IS of the quantized" in caplog.text
