"""All configs but the default one say only what differs, for what, and compose with each other."""

from __future__ import annotations

import shlex
from functools import cache
from itertools import permutations
from pathlib import Path

import pytest
import yaml

from tcaq_lightning.cli import parse_config
from tcaq_lightning.config import Config

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
OVERLAYS = [path for path in FILES if path.stem != "default"]
BITS = ("w8a8", "w6a6", "w4a8", "w4a4")
MOST_LINES = 1500
LONGEST = 45
each_overlay = pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)


def header(path: Path) -> list[str]:
    """The lines of a file's first comment, without their marks."""
    lines = path.read_text().splitlines()
    return [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[0] != "#")]]


@cache
def parse(*paths: Path) -> Config:
    """The configuration of some files together; not to be changed."""
    return parse_config([argument for path in paths for argument in ("--config", str(path))])[0]


def test_together_they_are_short() -> None:
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= MOST_LINES


def test_there_are_configs_for_every_width_and_each_row_of_the_ablation() -> None:
    assert {path.stem for path in OVERLAYS} >= {*BITS, "quickstart", "peers"}
    rows = sorted(path.stem for path in (ROOT / "configs" / "ablation").glob("*.yaml"))
    assert [row[0] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]


@each_overlay
def test_it_is_short_and_its_header_says_what_it_is_for(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST
    said = header(path)
    assert said[0].endswith(".") or said[1]
    commands = [line for line in said if line.startswith("python train.py")]
    assert any(str(path.relative_to(ROOT)) in line for line in commands)
    for line in commands[1:]:
        words = shlex.split(line.replace("OTHER", "peers").split("  ")[0])[2:]
        parse_config([str(ROOT / word) if word.startswith("configs/") else word for word in words])


@each_overlay
def test_layers_are_named_by_role(path: Path) -> None:
    rules = yaml.safe_load(path.read_text()).get("quantization", {}).get("rules", [])
    assert all("role" in rule for rule in rules)


def test_a_width_is_all_that_a_width_says() -> None:
    for name in BITS:
        assert set(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())) == {"quantization"}


@each_overlay
def test_it_composes_with_a_width_in_either_order(path: Path) -> None:
    width = ROOT / "configs" / "w6a6.yaml"
    after, before = parse(path, width), parse(width, path)
    assert (after.quantization.weight.bits, after.quantization.activation.bits) == (6, 6)
    for config in (after, before):
        assert (config.calibration, config.model) == (parse(path).calibration, parse(path).model)


@pytest.mark.slow
def test_every_two_configs_compose() -> None:
    for first, second in permutations(OVERLAYS, 2):
        assert parse(first, second).calibration.num_trajectories >= 1


def test_rows_of_the_ablation_add_one_thing_after_another() -> None:
    rows = [parse(path) for path in sorted((ROOT / "configs" / "ablation").glob("*.yaml"))]
    assert {row.reconstruction.iterations for row in rows} == {rows[0].reconstruction.iterations}
    assert len({str(row.calibration) + str(row.evaluation) + str(row.quantization.rules) for row in rows}) == 1
    switched = {
        1: [row.reconstruction.enabled for row in rows],
        2: [row.headroom.enabled for row in rows],
        3: [row.reconstruction.weighting == "sensitivity" for row in rows],
        4: [row.reconstruction.bias_correction and row.reconstruction.gate for row in rows],
        5: [row.quantization.activation.timestep_groups == 20 for row in rows],
        6: [row.tcr.enabled for row in rows],
        7: [row.daq.enabled for row in rows],
        8: [row.par.enabled for row in rows],
    }
    assert switched == {first: [number >= first for number in range(9)] for first in range(1, 9)}
