from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tcaq_lightning.calibration.run_dir import Run, settings_of_result
from tcaq_lightning.config import Config, LoggingConfig, ModelConfig, TrainerConfig
from tcaq_lightning.errors import UserError


def started(directory: Path, **facts: object) -> Run:
    run = Run(Config(run_dir=directory))
    run.read()
    run.start(**facts)
    return run


def test_reading_writes_nothing(tmp_path: Path) -> None:
    run = Run(Config(run_dir=tmp_path / "run"))
    run.read()
    assert not run.finished
    assert not (tmp_path / "run").exists()


def test_manifest_and_config_come_back(tmp_path: Path) -> None:
    started(tmp_path / "run", plan={"units": 3}).finish()
    again = Run(Config(run_dir=tmp_path / "run"))
    again.read()
    assert again.finished
    assert again.manifest["plan"] == {"units": 3}
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
    first.finish()


def test_settings_of_result_tell_no_place(tmp_path: Path) -> None:
    values = settings_of_result(Config(run_dir=tmp_path / "run", model=ModelConfig(str(tmp_path))))
    assert values["model"]["path"] == tmp_path.name
    assert not {"run_dir", "trainer", "logging", "evaluation"} & values.keys()
    assert settings_of_result(Config(model=ModelConfig("google/ddpm-cifar10-32")))["model"]["path"].startswith(
        "google/"
    )


def test_an_extension_that_has_changed_is_refused(tmp_path: Path) -> None:
    started(tmp_path, extensions={"mine.py": "a1"}).release()
    with pytest.raises(UserError, match=r"extensions: mine\.py has changed since"):
        started(tmp_path, extensions={"mine.py": "b2"})
    started(tmp_path, extensions={"mine.py": "a1"})


def test_settings_of_result_name_extensions_without_their_directories() -> None:
    settings = settings_of_result(Config(extensions=["/home/me/mine.py", "package.module"]))
    assert settings["extensions"] == ["mine.py", "package.module"]
