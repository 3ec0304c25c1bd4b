from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tcaq_lightning.__main__ import main
from tcaq_lightning.cli.compare import RECIPES

ROOT = Path(__file__).parents[2]


def test_finished_runs_side_by_side(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(trained, tmp_path / "other")
    output = tmp_path / "out"
    assert main(["compare", str(trained), str(other), "--output", str(output)]) == 0
    content = json.loads((output / "comparison.json").read_text())
    first, second = content["rows"]
    assert (first["method"], first["bits"]) == ("run", "w4a4")
    assert second["noise_error"]["to_first"] == {"ratio": 1.0, "interval": [1.0, 1.0]}
    assert second["noise_error"]["better_than_first"] == "not told apart"
    low, high = first["image_mse"]["interval"]
    assert low <= first["image_mse"]["value"] <= high
    text = (output / "comparison.md").read_text()
    assert "| other | W4A4 |" in text
    assert "not told apart" in text
    assert (output / "grid.png").stat().st_size > 500
    page = (output / "comparison.html").read_text()
    assert page.count("<svg") == 1
    assert page.count("data:image/png") == 1
    events = sorted({p.parent.name for p in (output / "tensorboard").glob("*/events*")})
    assert events == ["other-w4a4", "run-w4a4"]
    assert "other" in capsys.readouterr().out


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with."""
    assert main(["compare", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = failing(capsys, "nearst", "--output", str(tmp_path / "out"))
    assert "such as nearest" in line
    assert not (tmp_path / "out").exists()


def test_odd_widths_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = failing(capsys, "nearest", "--bits", "w9a4", "--output", str(tmp_path / "out"))
    assert line == "error: --bits: expected widths such as w4a8, each 2..8, got 'w9a4'"


def test_a_recipe_given_twice_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "given twice" in failing(capsys, "nearest", "nearest", "--output", str(tmp_path / "out"))


def test_a_recipe_that_does_not_fit_is_refused_before_any_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("quantization: {rules: [{pattern: no_such_layer, keep: true}]}\n")
    line = failing(capsys, "nearest", str(bad), "--output", str(tmp_path / "out"))
    assert "no_such_layer" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_recipes_of_a_tiny_model(trained: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((trained.parent / "tiny.yaml").read_text())
    common = {key: settings[key] for key in ("calibration", "reconstruction", "evaluation", "trainer")}
    common["quantization"] = {"activation": {"timestep_groups": 2}}
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(common))
    command = ["compare", "nearest", "ours", "--model", settings["model"]["path"], "--bits", "w8a8,w4a4"]
    command += ["--settings", str(tmp_path / "common.yaml"), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert [(r["method"], r["bits"]) for r in rows] == [
        ("nearest", "w8a8"),
        ("ours", "w8a8"),
        ("nearest", "w4a4"),
        ("ours", "w4a4"),
    ]
    assert all(r["peak_memory"] > 1e8 for r in rows)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").rglob("*") if p.is_file()}
    assert main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").rglob("*") if p.is_file()}
    full = [p for p in (tmp_path / "out" / "shared" / "evaluation").iterdir() if p.is_dir()]
    assert len(list((tmp_path / "out" / "shared" / "trajectories").iterdir())) == 1
    assert len(full) == 5  # the full-precision images once, and those of each row


def test_every_recipe_says_where_it_is_from() -> None:
    for path in sorted((ROOT / RECIPES).glob("*.yaml")):
        comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(f"compare {path.stem}" in line or f" {path.stem} " in line for line in comments), path.name
