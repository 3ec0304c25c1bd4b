"""The command line of train.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tcaq_lightning.cli import parse_config
from tcaq_lightning.config import Config, LayerRule, SamplerConfig
from tcaq_lightning.config.keys import documented_yaml
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
        ("seed: 1\nseed: 2", "the key seed is there twice"),
        ("quantization:", "quantization must hold keys and values, got null"),
        ("seed:", "seed must be int, got null"),
        ("calibration: {sampler: {eta: high}}", "calibration.sampler.eta must be float, got high"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(write(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_are_laid_over_each_other(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "seed: 3\ntcr: {enabled: false, share: 0.5}\nquantization: {rules: [{role: input, keep: true}]}\n"
        "calibration: {sampler: {num_steps: 30, options: {clip_sample: false}}}\nevaluation: {sampler: {eta: 0.5}}\n"
    )
    second.write_text(
        "tcr: {share: 0.4}\nquantization: {rules: [{role: output, weight_bits: 8}]}\nseed: 4\n"
        "evaluation: {sampler: {num_steps: 7}}\n"
    )
    config, _ = parse_config(["--seed", "5", "--config", str(first), f"--config={second}", "--tcr.truncation", "4"])
    assert config.seed == 5  # options override all files
    assert (config.tcr.enabled, config.tcr.share, config.tcr.truncation) == (False, 0.4, 4.0)
    assert config.quantization.rules == [LayerRule(role="output", weight_bits=8)]
    assert config.calibration.sampler == SamplerConfig(num_steps=30, options={"clip_sample": False})
    assert config.evaluation.sampler == SamplerConfig(num_steps=7, eta=0.5)
    swapped, _ = parse_config(["--config", str(second), "--config", str(first)])
    assert (swapped.seed, swapped.tcr.share) == (3, 0.5)


def test_all_keys_of_the_documented_file_are_the_defaults(tmp_path: Path) -> None:
    text = documented_yaml(Config)
    assert max(map(len, text.splitlines())) <= 120
    config, _ = parse_config(write(tmp_path, text))
    assert config == Config()
    assert yaml.safe_load(text) | {"run_dir": str(config.run_dir)} == Config().to_dict()
    assert "# Code width, 2..8. (int, default: 4)\n    bits: 4\n" in text


@pytest.mark.parametrize("flag", ["--help", "--help_all"])
def test_help_names_all_keys(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_config([flag])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "example:" in lines
    if flag == "--help":
        assert len(lines) <= 45
        assert any("--reconstruction.*" in line for line in lines)
    else:
        assert any("--reconstruction.bias_rate" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--reconstruction.autocast", "true"], "reconstruction.autocast", True),
        (["--reconstruction.autocast", "auto"], "reconstruction.autocast", "auto"),
        (["--reconstruction.step_lr", "1e-3"], "reconstruction.step_lr", 1e-3),
        (["--reconstruction.patience", "null"], "reconstruction.patience", None),
        (["--conditioning.negative_prompt", "123"], "conditioning.negative_prompt", "123"),
        (["--conditioning.class_labels", "1,2"], "conditioning.class_labels", [1, 2]),
        (["--conditioning.class_labels", "[1, 2]"], "conditioning.class_labels", [1, 2]),
        (["--conditioning.prompts", "a.txt"], "conditioning.prompts", Path("a.txt")),
        (["--conditioning.options.height", "64"], "conditioning.options", {"height": 64}),
        (["--conditioning.options", "{kind: fine}"], "conditioning.options", {"kind": "fine"}),
        (["--evaluation.sampler", "{num_steps: 4}"], "evaluation.sampler", SamplerConfig(num_steps=4)),
        (["--evaluation.sampler.eta=1"], "evaluation.sampler", SamplerConfig(eta=1.0)),
        (["--evaluation.metrics", "fid,kid"], "evaluation.metrics", ["fid", "kid"]),
        (["--extensions", "mine.py"], "extensions", ["mine.py"]),
        (["--tcr.enabled=false"], "tcr.enabled", False),
    ],
)
def test_texts_become_what_their_key_wants(arguments: list[str], key: str, value: object) -> None:
    found: object = parse_config(arguments)[0]
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantization.weight.bits", "x"], "quantization.weight.bits"),
        (["--quantization.weight.bits", "9"], "must be in 2..8, got 9"),
        (["--no.such.key", "1"], "--no.such.key"),
        (
            ["--reconstruction.weighting", "guess"],
            "reconstruction.weighting must be sensitivity | uniform, got guess",
        ),
        (["--calibration.sampler.num_steps", "0"], "calibration.sampler.num_steps must be at least 1, got 0"),
        (["--evaluation.sampler.num_steps", "0"], "evaluation.sampler.num_steps must be at least 1, got 0"),
        (["--evaluation.sampler.num_stepz", "1"], "--evaluation.sampler.num_steps"),
        (["--conf", "x.yaml"], "unknown option --conf"),
        (["--seed", "null"], "seed must be int, got null"),
        (["--seed", "true"], "seed must be int, got true"),
        (["--seed"], "--seed: expected a value"),
        (["--quantization.weight", "4"], "quantization.weight must hold keys and values, got 4"),
        (["--conditioning.class_labels", "a"], "conditioning.class_labels[0] must be int, got a"),
        (["--tcr.enabled", "maybe"], "tcr.enabled must be bool, got maybe"),
        (["--seed", "{a"], "seed: no valid YAML"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
    ],
)
def test_a_mistake_in_an_argument_is_named(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(arguments)
    assert words in str(caught.value)
