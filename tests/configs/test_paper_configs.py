"""Every benchmark of the paper can be planned without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcaq_lightning.calibration.planning.sketch import sketch_run
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
def test_dry_run(name: str) -> None:
    path = PAPER / f"{name}.yaml"
    config, _ = parse_config(["--config", str(path)])
    assert not Path(config.model.path).exists()
    sketch = sketch_run(config)
    weights, activations = int(name[-3]), int(name[-1])
    assert f"W{weights} A{activations}" in {row.bits for row in sketch.coverage}
    assert not any("unknown attention" in row.note for row in sketch.coverage)
    assert "million parameters" in str(sketch)
    header = path.read_text().splitlines()[0]
    assert header.startswith("# ")
    assert name[-4:].upper() in "".join(path.read_text().splitlines()[:2])
