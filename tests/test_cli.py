"""The command line of train.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcaq_lightning.cli import parse_config
from tcaq_lightning.config import LayerRule
from tcaq_lightning.errors import UserError


def write(directory: Path, text: str) -> list[str]:
    path = directory / "config.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_a_file_and_overrides(tmp_path: Path) -> None:
    arguments = write(
        tmp_path,
        "seed: 3\nquantization:\n  rules:\n    - {pattern: conv_in, weight_bits: 8}\n"
        "calibration: {sampler: {options: {clip_sample: false}}}\n",
    )
    config, dry_run = parse_config([*arguments, "--quantization.weight.bits", "6", "--run_dir", "x/y", "--dry_run"])
    assert dry_run
    assert config.seed == 3
    assert config.run_dir == Path("x/y")
    assert config.quantization.weight.bits == 6
    assert config.quantization.rules == [LayerRule("conv_in", weight_bits=8)]
    assert config.calibration.sampler.options == {"clip_sample": False}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quantizaton: {}", "unknown key quantizaton"),
        ("quantization: {weight: {bitz: 3}}", "unknown key quantization.weight.bitz"),
        ("quantization: {rules: [{patern: a}]}", "unknown key quantization.rules[0].patern"),
        ("- 1", "must hold keys and values"),
        ("seed: {a", "no valid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(write(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantization.weight.bits", "x"], "quantization.weight.bits"),
        (["--quantization.weight.bits", "9"], "must be in 2..8, got 9"),
        (["--no.such.key", "1"], "--no.such.key"),
        (["--daq.rule", "guess"], "daq.rule"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
    ],
)
def test_a_mistake_in_an_argument_is_named(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(arguments)
    assert words in str(caught.value)
