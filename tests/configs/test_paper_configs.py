"""Every benchmark of the paper can be planned without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcaq_lightning.api import sketch_job
from tcaq_lightning.cli import parse_config

PAPER = Path(__file__).parents[2] / "configs" / "paper"
BENCHMARKS = ("cifar10", "lsun_bedrooms", "lsun_churches", "imagenet", "coco")
BITS = ("w8a8", "w6a6", "w4a8", "w4a4")
FIRST = ("cifar10_w4a8",)
CONFIGS = [f"{name}_{bits}" for name in BENCHMARKS for bits in BITS]


def test_there_is_a_config_for_each_benchmark_and_width() -> None:
    assert {path.stem for path in PAPER.glob("*.yaml")} == set(CONFIGS)


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_dry_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = PAPER / f"{name}.yaml"
    config, _ = parse_config(["--config", str(path)])
    assert not Path(config.model.path).exists()
    sketch_job(config)
    shown = capsys.readouterr().out
    weights, activations = int(name[-3]), int(name[-1])
    assert f"W{weights} A{activations}" in shown
    assert "unknown attention" not in shown
    assert "million parameters" in shown
    header = path.read_text().splitlines()[0]
    assert header.startswith("# ")
    assert name[-4:].upper() in "".join(path.read_text().splitlines()[:2])
