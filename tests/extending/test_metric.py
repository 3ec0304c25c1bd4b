"""The example of docs/extending.md: a metric in a file outside of the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tcaq_lightning.__main__ import main
from tcaq_lightning.evaluation.images import ImageWriter
from tcaq_lightning.reports.headline import headline
from tcaq_lightning.reports.markdown import render
from tests.evaluation.inception_weights import pictures

EXAMPLE = Path(__file__).parents[2] / "docs" / "extending" / "metric.py"


def test_a_metric_of_ones_own_is_measured_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = pictures(7)
    ImageWriter(tmp_path / "images", "test").write(range(7), pixels)
    output = tmp_path / "metrics.json"
    options = ["--extensions", f"[{EXAMPLE}]", "--metrics", "contrast", "--batch_size", "3", "--output", str(output)]
    assert main(["evaluate", str(tmp_path / "images"), *options]) == 0
    expected = float(pixels.double().flatten(1).std(dim=1).mean())
    content = json.loads(output.read_text())
    assert content["scores"] == {"images": {"contrast": {"mean": pytest.approx(expected), "num_samples": 7}}}
    text = f"{expected:.1f} of 255, 7 images"
    assert text in capsys.readouterr().out
    assert headline(content) == [("contrast, images", text)]
    assert f"| contrast, images | {text} |" in render(content)
