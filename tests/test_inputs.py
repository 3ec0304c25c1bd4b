"""A run is of its inputs: others in the same directory are refused by name, and its files are of no use elsewhere."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from safetensors import safe_open

from tcaq_lightning import quantize
from tcaq_lightning.api import calibrate, collect_trajectories, open_model
from tcaq_lightning.calibration.run_dir import Run
from tcaq_lightning.calibration.run_files import RunFiles
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.files import DamagedFileError, load_tensors
from tests.test_api import config, labelled_unet, labels


def pipeline(**scheduler: Any) -> DDPMPipeline:
    return DDPMPipeline(labelled_unet(), DDIMScheduler(clip_sample=False, **scheduler))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("inputs") / "run"
    quantize(pipeline(), config(), run_dir, inputs=labels)
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_same_inputs_open_the_artifact(run_dir: Path) -> None:
    opened = quantize(pipeline(), config(), run_dir, inputs=labels)
    assert type(opened) is DDPMPipeline


def test_another_model_is_refused(run_dir: Path) -> None:
    other = pipeline()
    with torch.no_grad():
        other.unet.conv_in.weight *= 1.5
    with pytest.raises(UserError, match=r"^model\.unet is not what .*run was made with: expected hash \w{8}, got hash"):
        quantize(other, config(), run_dir, inputs=labels)


def test_another_scheduler_is_refused(run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.scheduler is not what"):
        quantize(pipeline(beta_end=0.03), config(), run_dir, inputs=labels)


def test_other_arguments_are_refused(run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"^conditioning\.inputs is not what"):
        quantize(pipeline(), config(), run_dir, inputs=lambda i: {"class_labels": torch.tensor(list(i)) % 2 + 1})


def test_a_model_trained_on_in_place_is_not_mixed_with_stored_units(run_dir: Path) -> None:
    """An unfinished run, of whose units some are stored."""
    shutil.rmtree(run_dir)
    given, settings = pipeline(), config()
    settings.run_dir = run_dir
    settings.trainer.stop_after = "conv_in"
    with Run(settings) as run:
        model = open_model(settings, given, labels)
        run.start(**model.facts())
        assert calibrate(model, collect_trajectories(model, run), run) is None
    with torch.no_grad():
        given.unet.conv_out.weight += 0.01
    with Run(settings) as run, pytest.raises(UserError, match=r"^model\.unet is not what"):
        run.start(**open_model(settings, given, labels).facts())


def test_another_artifact_in_its_place_is_refused(run_dir: Path) -> None:
    (run_dir / "quantized" / "checksums.json").write_text("{}")
    with pytest.raises(UserError, match="is not the artifact that the finished run wrote"):
        quantize(pipeline(), config(), run_dir, inputs=labels)


def test_units_of_two_rounds_swapped_are_done_again(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config()
    settings.run_dir = run_dir
    with Run(settings) as run:
        before = {p: load_tensors(p)[0] for p in run_dir.glob("rounds/*/units/*.safetensors")}
        model = open_model(settings, pipeline(), labels)
        run.start(**model.facts())
        one, two = (next(run.files.round_dir(i).glob("units/*conv_in*")) for i in range(2))
        kept = run_dir / "kept"
        one.replace(kept)
        two.replace(one)
        kept.replace(two)
        with caplog.at_level(logging.WARNING):
            calibrate(model, collect_trajectories(model, run), run)
    assert "is not of file unit" in caplog.text
    for path, tensors in before.items():
        after = load_tensors(path)[0]
        assert all(torch.equal(after[name], tensors[name]) for name in tensors)


def test_every_file_is_what_its_name_says(finished: Path) -> None:
    found = sorted(p for p in finished.rglob("*.safetensors"))
    assert len(found) > 10
    for path in found:
        with safe_open(path, "pt") as file:
            assert list(file.keys())
            if "quantized" not in path.parts:
                assert "sha256" in file.metadata()


def test_files_of_another_run_are_of_no_use(finished: Path) -> None:
    own = RunFiles(finished, "another run")
    with pytest.raises(DamagedFileError, match="is not of file trajectories, run another run: it was written as file"):
        own.trajectories.load()
