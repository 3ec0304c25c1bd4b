"""Every shipped config documents every key and runs."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from tcaq_lightning.cli import parse_config
from tcaq_lightning.config import Config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
RUNNABLE = [path for path in CONFIGS if path.parent.name != "paper"]  # those need checkpoints: see test_paper_configs
UNCONDITIONAL = "fashion-mnist-ddpm"
BETWEEN = ("fashion_mnist_w6a6", "fashion_mnist_w8a8", "tcr", "tcr_daq")
"""Configs that lie between others, in what they switch on or in bits."""


def keys(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields; a field that may be null counts as one key."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        nested = dataclasses.is_dataclass(hint)
        found += [f"{prefix}{name}", *(keys(hint, f"{prefix}{name}.") if nested else [])]
    return found


def documented(text: str) -> set[str]:
    """Dotted names of the keys of a YAML text that stand right under a comment."""
    found, stack, commented = set(), [], False
    for line in text.splitlines():
        stripped = line.strip()
        depth = (len(line) - len(line.lstrip())) // 2
        if stripped.startswith("#"):
            commented = True
        elif stripped and not stripped.startswith("- "):
            stack[depth:] = [stripped.split(":")[0]]
            if commented:
                found.add(".".join(stack))
            commented = False
    return found


def test_there_are_configs_for_every_width_and_ablation() -> None:
    names = {p.stem for p in CONFIGS}
    assert {f"fashion_mnist_{w}" for w in ("w8a8", "w6a6", "w4a8", "w4a4")} | {"quickstart"} <= names
    assert {"nearest", "reconstruction", "tcr", "tcr_daq", "tcr_daq_par"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_key_is_there_and_documented(path: Path) -> None:
    text = path.read_text()
    expected = set(keys(Config))
    assert expected <= documented(text)
    config, dry_run = parse_config(["--config", str(path)])
    assert not dry_run
    assert config.to_dict()["quantization"] == yaml.safe_load(text)["quantization"] | {
        "rules": [dataclasses.asdict(rule) for rule in config.quantization.rules]
    }


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in BETWEEN), id=path.stem) for path in RUNNABLE],
)
def test_runs(path: Path, command: Any, model: Path, tmp_path: Path) -> None:
    """On a tiny model in the place of the shipped unconditional one."""
    own = yaml.safe_load(path.read_text())["model"]["path"]
    small = {
        "run_dir": tmp_path / "run",
        "model.path": model if own == UNCONDITIONAL else own,
        "calibration.num_trajectories": 4,
        "calibration.held_out_trajectories": 2,
        "calibration.mismatch_trajectories": 2,
        "calibration.sampler.num_steps": 3,
        "quantization.activation.timestep_groups": min(
            3, yaml.safe_load(path.read_text())["quantization"]["activation"]["timestep_groups"]
        ),
        "reconstruction.iterations": 8,
        "reconstruction.batch_size": 4,
        "evaluation.num_trajectories": 2,
        "evaluation.num_images": 4,
        "trainer.threads": 1,
        "logging.tensorboard": "false",
    }
    ended = command("--config", path, *(f"--{key}={value}" for key, value in small.items()))
    assert (ended.code, ended.err) == (0, "")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["noise_error"]["summary"] < 1
    name = "transformer" if own == "fashion-mnist-dit" else "unet"
    assert (tmp_path / "run" / "quantized" / name / "config.json").is_file()
