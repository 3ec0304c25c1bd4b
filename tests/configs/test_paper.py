"""Every benchmark of the paper can be planned without its weights, at every width."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcaq_lightning.calibration.planning.sketch import sketch_run
from tcaq_lightning.cli import parse_config
from tcaq_lightning.nn.coverage import UNKNOWN_ATTENTION

CONFIGS = Path(__file__).parents[2] / "configs"
BENCHMARKS = ("cifar10", "lsun_bedrooms", "lsun_churches", "imagenet", "coco")
BITS = ("w8a8", "w6a6", "w4a8", "w4a4")


def test_there_is_a_config_for_each_benchmark_with_the_figures_of_each_width() -> None:
    assert {path.stem for path in (CONFIGS / "paper").glob("*.yaml")} == set(BENCHMARKS)
    for name in BENCHMARKS:
        text = (CONFIGS / "paper" / f"{name}.yaml").read_text()
        assert all(f"#   {bits.upper()}  " in text for bits in BITS)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_dry_run(name: str, bits: str) -> None:
    files = CONFIGS / f"{bits}.yaml", CONFIGS / "paper" / f"{name}.yaml"
    config, _ = parse_config([argument for file in files for argument in ("--config", str(file))])
    assert not Path(config.model.path).exists()
    sketch = sketch_run(config)
    assert f"W{bits[1]} A{bits[3]}" in {row.bits for row in sketch.coverage}
    assert not any(row.note.startswith(UNKNOWN_ATTENTION) for row in sketch.coverage)
    assert "million parameters" in str(sketch)
