"""Where activations are kept changes nothing in the result; a budget that will not do is refused before work starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.conftest import Command, contents
from tests.train.test_mistakes import assert_refused
from tests.train.test_resume import assert_same

HOST, DISK, STORAGE = (f"--calibration.{key}" for key in ("memory_budget.host", "memory_budget.disk", "storage"))


def test_activations_in_files_give_the_same_bits(
    command: Command, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run")
    # the first command keeps them in memory, is killed, and the next ones may do with less
    assert command(*args, fault=("tcaq_lightning.calibration.streams:Streams.store", 4, "SIGKILL")).code == -9
    killed = command(*args, HOST, "0.0001", fault=("tcaq_lightning.calibration.streams:Streams.store", 5, "SIGKILL"))
    assert killed.code == -9
    ended = command(*args, HOST, "0")
    assert (ended.code, ended.err) == (0, "")
    assert "disk 0.00" in ended.out
    assert_same(tmp_path / "run", undisturbed)


def test_too_small_a_budget_names_the_least_that_would_do(command: Command, config: Path, tmp_path: Path) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run", HOST, "0.0001")
    ended = command(*args, DISK, "0.0001")
    assert_refused(ended, "calibration.memory_budget", "disk 0.0001")
    assert not (tmp_path / "run").exists()
    least = ended.err.split("calibration.memory_budget.disk to at least ")[1].split(" ")[0]
    assert command(*args, DISK, str(float(least) * 0.99), "--dry_run").code == 2
    assert command(*args, DISK, least, "--dry_run").code == 0


def test_a_disk_that_is_full_when_activations_spill(
    command: Command, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run")
    ended = command(*args, HOST, "0", limit=24_000)
    assert_refused(ended, str(tmp_path / "run"))
    assert not list(tmp_path.rglob(".*"))
    assert command(*args).code == 0
    assert_same(tmp_path / "run", undisturbed)


def test_bfloat16_storage(command: Command, config: Path, undisturbed: Path, tmp_path: Path) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run")
    ended = command(*args, STORAGE, "bfloat16")
    assert (ended.code, ended.err) == (0, "")
    assert contents(tmp_path / "run" / "quantized") != contents(undisturbed / "quantized")
    assert_refused(command(*args), "calibration.storage", "bfloat16", "float32")


@pytest.mark.slow
def test_bfloat16_storage_is_about_as_good(command: Command, config: Path, tmp_path: Path) -> None:
    errors = {"bfloat16": 0.0, "float32": 0.0}
    one_round = ("--config", config, "--par.enabled", "false")
    for seed in range(1, 4):  # what a tiny model learns in a few steps depends on the seed
        for storage in errors:
            run = tmp_path / f"{storage}-{seed}"
            assert command(*one_round, "--run_dir", run, STORAGE, storage, "--seed", seed).code == 0
            errors[storage] += json.loads((run / "metrics.json").read_text())["noise_error"]["summary"]
    assert errors["bfloat16"] < 1.2 * errors["float32"]
