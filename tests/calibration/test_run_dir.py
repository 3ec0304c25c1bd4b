from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tcaq_lightning.artifact.directory import CHECKSUMS_FILE
from tcaq_lightning.calibration.run_dir import Run, settings_of_result
from tcaq_lightning.config import Config, LoggingConfig, ModelConfig, TrainerConfig
from tcaq_lightning.errors import UserError

INPUTS = {"model.unet": "a1b2c3d4e5", "model.scheduler": "f6a7b8c9d0"}
PLAN = {"processes": 1, "model_bytes": 8, "workspace_bytes": {"learn": 4.0}}


def started(directory: Path, inputs: dict[str, str] | None = None, **facts: object) -> Run:
    run = Run(Config(run_dir=directory))
    run.read()
    run.start(INPUTS if inputs is None else inputs, **facts)
    return run


def finished(directory: Path) -> Run:
    run = started(directory)
    (directory / "quantized").mkdir()
    (directory / "quantized" / CHECKSUMS_FILE).write_text("{}")
    run.finish()
    return run


def edited(directory: Path, **changes: object) -> None:
    """Edit a manifest by hand."""
    file = directory / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_reading_writes_nothing(tmp_path: Path) -> None:
    run = Run(Config(run_dir=tmp_path / "run"))
    run.read()
    assert not run.finished
    assert not (tmp_path / "run").exists()


def test_manifest_and_config_come_back(tmp_path: Path) -> None:
    started(tmp_path / "run", plan=PLAN).release()
    again = Run(Config(run_dir=tmp_path / "run"))
    again.read()
    assert not again.finished
    assert again.manifest["plan"] == PLAN
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == again.config.to_dict()


def test_one_command_at_a_time(tmp_path: Path) -> None:
    first = started(tmp_path)
    with pytest.raises(UserError, match="another command is at work"):
        started(tmp_path)
    first.release()
    started(tmp_path)


def test_leftovers_of_a_killed_start(tmp_path: Path) -> None:
    """A manifest that was being written makes no directory of something else."""
    (tmp_path / ".manifest.json.17.tmp").write_text("{")
    started(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UserError, match="run_dir"):
            Run(Config(run_dir=path)).read()


def test_only_settings_without_influence_may_change(tmp_path: Path) -> None:
    started(tmp_path)
    trainer, logging = TrainerConfig(checkpoint_every=7), LoggingConfig(grid_images=3)
    Run(Config(run_dir=tmp_path, trainer=trainer, logging=logging)).read()
    with pytest.raises(UserError, match=r"^seed is 5 but .* was made with 0"):
        Run(Config(run_dir=tmp_path, seed=5)).read()


def test_a_finished_run_is_of_its_artifact(tmp_path: Path) -> None:
    finished(tmp_path).release()
    with Run(Config(run_dir=tmp_path)) as run:
        assert run.finished
        run.check_finished(INPUTS)
        (tmp_path / "quantized" / CHECKSUMS_FILE).write_text('{"a": 1}')
        with pytest.raises(UserError, match="is not the artifact that the finished run wrote"):
            run.check_finished(INPUTS)


@pytest.mark.parametrize("name", ["model.unet", "model.scheduler", "conditioning.prompts"])
def test_another_input_is_refused_by_name(tmp_path: Path, name: str) -> None:
    finished(tmp_path).release()
    other = INPUTS | {name: "0123456789abcdef"}
    with Run(Config(run_dir=tmp_path)) as run:
        for refusing in (run.check_finished, run.start):
            with pytest.raises(UserError, match=rf"^{name} is not what .* expected .*, got hash 01234567; use another"):
                refusing(other)


def test_an_input_that_is_gone_is_refused(tmp_path: Path) -> None:
    started(tmp_path).release()
    with pytest.raises(UserError, match=r"model\.scheduler is not what .* expected hash f6a7b8c9, got none"):
        started(tmp_path, {"model.unet": INPUTS["model.unet"]})


def test_files_are_of_a_run_by_its_settings_and_inputs(tmp_path: Path) -> None:
    runs = [started(tmp_path / str(i), inputs) for i, inputs in enumerate([INPUTS, INPUTS, {"model.unet": "x"}])]
    names = [run.files.trajectories.place["run"] for run in runs]
    assert names[0] == names[1] != names[2]
    other = Run(Config(run_dir=tmp_path / "seed", seed=1))
    other.start(INPUTS)
    assert other.files.trajectories.place["run"] not in names


@pytest.mark.parametrize(
    "changes",
    [{"finished": True}, {"plan": {**PLAN, "model_bytes": 9}}, {"inputs": {"model.unet": "x"}}, {"sha256": "0"}],
)
def test_a_manifest_edited_by_hand_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    started(tmp_path, plan=PLAN).release()
    edited(tmp_path, **changes)
    with pytest.raises(UserError, match=r"manifest\.json is damaged: .* its checksum does not fit its content"):
        Run(Config(run_dir=tmp_path)).read()


@pytest.mark.parametrize("changes", [{"plan": []}, {"units": 3}, {"versions": None}, {"finished": "yes"}])
def test_a_manifest_of_wrong_content_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    run = started(tmp_path)
    run.manifest |= changes
    run._write()
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Run(Config(run_dir=tmp_path)).read()


def test_a_run_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    started(tmp_path).release()
    file = tmp_path / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: content[key] for key in ("config", "versions")} | {"version": "0.0.9"}))
    with pytest.raises(
        UserError, match=r"manifest\.json is of version 0\.0\.9, whose runs this version does not go on"
    ):
        Run(Config(run_dir=tmp_path)).read()


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"config": {}, "config_sha256": "0"}'])
def test_damaged_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        Run(Config(run_dir=tmp_path)).read()
    assert (tmp_path / "manifest.json").read_text() == content


def test_changed_settings_in_the_manifest_are_damage(tmp_path: Path) -> None:
    started(tmp_path)
    file = tmp_path / "manifest.json"
    content = json.loads(file.read_text())
    content["config"]["seed"] = 1
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        Run(Config(run_dir=tmp_path, seed=1)).read()


def test_second_command_is_refused(tmp_path: Path) -> None:
    first = started(tmp_path)
    with pytest.raises(UserError, match="another command"):
        started(tmp_path)
    first.release()


def test_settings_of_result_tell_no_place(tmp_path: Path) -> None:
    values = settings_of_result(Config(run_dir=tmp_path / "run", model=ModelConfig(str(tmp_path))))
    assert values["model"]["path"] == tmp_path.name
    assert not {"run_dir", "trainer", "logging", "evaluation"} & values.keys()
    assert settings_of_result(Config(model=ModelConfig("google/ddpm-cifar10-32")))["model"]["path"].startswith(
        "google/"
    )


def test_settings_of_result_name_extensions_without_their_directories() -> None:
    settings = settings_of_result(Config(extensions=["/home/me/mine.py", "package.module"]))
    assert settings["extensions"] == ["mine.py", "package.module"]
