"""A run on several ranks: one result, ended as one, resumed in the same bits, and also on another number of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tcaq_lightning.runtime.files import load_tensors
from tests.shared import shared
from tests.train.conftest import Command, Ended, Settings, changed, contents
from tests.train.test_resume import (
    BATCH,
    CHECKPOINT,
    CHECKSUMS,
    OBSERVE,
    RENAME,
    SAMPLE,
    SAVE,
    STEP,
    STORE,
    assert_same,
)

ROOT = Path(__file__).parents[2]
QUICK = ("--trainer.timeout", "1")
"""A lost connection must be noticed by itself, not by a timeout; should it not be, the test ends soon."""
SEARCH = "tcaq_lightning.calibration.unit:initialize"

# In the order in which a run comes by; the second rank writes nothing.
MOMENTS = [
    (0, SAMPLE, 2),  # trajectories
    (1, SAMPLE, 2),
    (0, RENAME, 3),  # trajectories, written but not in place
    (1, OBSERVE, 1),
    (0, SEARCH, 2),
    (1, STEP, 3),  # r phase
    (0, CHECKPOINT, 2),  # V phase
    (1, STEP, 8),
    (0, SAVE, 1),  # a unit
    (1, STORE, 2),  # between units
    (1, STEP, 45),
    (0, SAMPLE, 2),  # mismatch after round 0
    (1, STEP, 7),  # round 1
    (0, CHECKSUMS, 1),  # the artifact
    (1, SAMPLE, 7),  # evaluation
    (0, BATCH, 2),
]


@pytest.fixture(scope="module")
def undisturbed_pair(command: Command, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN_DIR of a run on two ranks that nothing disturbed; not to be changed."""

    def run(root: Path) -> None:
        args = ("--config", config, "--run_dir", root / "run", *QUICK)
        first, second = command.ranks(*args, script="tests/train/compared.py")
        assert (first.code, first.err) == (0, "")
        assert (second.code, second.err, second.out) == (0, "", "")
        assert "round 2/2 unit 7/7 conv_out" in first.out

    return shared(tmp_path_factory, "pair", run) / "run"


def assert_lost(ended: list[Ended], killed: int, moment: Any = None) -> None:
    """The killed rank is missed in one line, by the first rank if it can."""
    assert ended[killed].code == -9, moment
    others = [e for i, e in enumerate(ended) if i != killed]
    assert [e.code for e in others] == [75] * len(others), others
    lines = "".join(e.err for e in others)
    assert lines.count("\n") == 1, lines
    assert lines.startswith("error: ")
    assert "gone" in lines
    assert "same command" in lines
    assert ".cc:" not in lines
    assert lines.endswith(")\n")


def test_two_ranks_do_what_one_does(undisturbed: Path, undisturbed_pair: Path) -> None:
    """Up to the order of sums and the samples that are drawn."""
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (undisturbed, undisturbed_pair))
    assert [(r["round"], r["unit"]) for r in one["units"]] == [(r["round"], r["unit"]) for r in two["units"]]
    trajectories = [
        load_tensors(d / "calibration" / "trajectories.safetensors")[0] for d in (undisturbed, undisturbed_pair)
    ]
    for key, value in trajectories[0].items():
        torch.testing.assert_close(trajectories[1][key], value)
    assert two["units"][0]["before"] == pytest.approx(one["units"][0]["before"], rel=1e-3)
    assert two["noise_error"]["summary"] == pytest.approx(one["noise_error"]["summary"], rel=0.3)
    assert two["same_noise"]["num_images"] == 4
    files = [{f for f in contents(d) if not f.startswith("evaluation/")} for d in (undisturbed, undisturbed_pair)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_ranks_agree_on_quantized_outputs(command: Command, config: Path, tmp_path: Path) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run", *QUICK, "--quantization.integer_ready", "true")
    first, second = command.ranks(*args, script="tests/train/compared.py")
    assert [(e.code, e.err) for e in (first, second)] == [(0, "")] * 2
    state = load_tensors(next((tmp_path / "run/rounds/00/units").glob("*conv_in*")))[0]
    assert state["output_quantizer.delta"].unique().numel() > 1  # set, and learned


@pytest.mark.parametrize("moments", [MOMENTS[5::4], pytest.param(MOMENTS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed(command: Command, config: Path, undisturbed_pair: Path, tmp_path: Path, moments: list[Any]) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run", *QUICK)
    for rank, target, number in moments:
        assert_lost(command.ranks(*args, faults={rank: (target, number, "SIGKILL")}), rank, (target, number))
    assert [(e.code, e.err) for e in command.ranks(*args)] == [(0, "")] * 2
    assert_same(tmp_path / "run", undisturbed_pair)


def test_stopped_politely(command: Command, config: Path, undisturbed_pair: Path, tmp_path: Path) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run", *QUICK)
    moments = [(SAMPLE, 2), (OBSERVE, 1), (STEP, 3), (CHECKPOINT, 3), (STORE, 4)]
    for i, (target, number) in enumerate(moments):
        name, code = (("SIGTERM", 143), ("SIGINT", 130))[i % 2]
        faults = dict.fromkeys(((0, 1), (0,), (1,))[i % 3], (target, number, name))
        ended = command.ranks(*args, faults=faults)
        assert [(e.code, e.err) for e in ended] == [(code, "")] * 2, (target, number)
        assert not list(tmp_path.rglob(".*")), (target, number)
    assert [e.code for e in command.ranks(*args)] == [0, 0]
    assert_same(tmp_path / "run", undisturbed_pair)


@pytest.mark.slow
def test_another_number_of_ranks(command: Command, config: Path, tmp_path: Path) -> None:
    """Finished units are kept, the one that was being learned is begun again, and it is said so."""
    args = ("--config", config, "--run_dir", tmp_path / "run", *QUICK)

    def units() -> dict[str, bytes]:
        return {k: v for k, v in contents(tmp_path / "run").items() if "/units/" in k}

    assert_lost(command.ranks(*args, faults={1: (STEP, 44, "SIGKILL")}), 1)
    (checkpoint,) = (tmp_path / "run").rglob("*-v.ckpt")
    begun = units()
    assert begun
    ended = command(*args, fault=(STEP, 44, "SIGKILL"))
    assert ended.code == -9
    assert f"{checkpoint} is of a run on 2 processes, not on 1; the unit is begun again" in ended.err
    assert all("begun again" in line for line in ended.err.splitlines())
    assert begun.items() < units().items()
    first, second = command.ranks(*args)
    assert [first.code, second.code] == [0, 0]
    assert "is of a run on 1 processes, not on 2" in first.err
    assert second.err == ""
    assert begun.items() < units().items()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["noise_error"]["summary"] < 1


def assert_refused(ended: list[Ended], *words: str) -> None:
    assert [e.code for e in ended] == [2, 2], ended
    assert ended[0].err.count("\n") == 1, ended[0].err
    assert ended[0].err.startswith("error: ")
    assert ended[1].err == ""
    for word in words:
        assert word in ended[0].err


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("reconstruction.batch_size", 3, ["reconstruction.batch_size", "multiple", "2", "3"]),
        ("trainer.devices", 3, ["trainer.devices", "3", "2"]),
        ("model.path", "/nowhere/model", ["model.path", "/nowhere/model"]),
        ("sede", 1, ["sede"]),
    ],
)
def test_mistakes(command: Command, settings: Settings, tmp_path: Path, key: str, value: Any, words: list[str]) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(yaml.safe_dump(changed(settings, key, value)))
    assert_refused(command.ranks("--config", config, "--run_dir", tmp_path / "run", *QUICK), *words)
    assert not (tmp_path / "run").exists()


def test_full_disk(command: Command, config: Path, tmp_path: Path) -> None:
    ended = command.ranks("--config", config, "--run_dir", tmp_path / "run", *QUICK, limit=6_000)
    assert_refused(ended, str(tmp_path / "run"), "free space")


def test_other_settings_and_a_finished_run(command: Command, config: Path, undisturbed_pair: Path) -> None:
    args = ("--config", config, "--run_dir", undisturbed_pair, *QUICK)
    before = contents(undisturbed_pair)
    assert_refused(command.ranks(*args, "--seed", "5"), "seed", str(undisturbed_pair))
    first, second = command.ranks(*args)
    assert ((first.code, first.err), (second.code, second.err)) == ((0, ""), (0, ""))
    assert "finished" in first.out
    assert second.out == ""
    assert contents(undisturbed_pair) == before


def started(*args: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """train.py as a user starts it."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_processes_that_the_command_starts(config: Path, undisturbed_pair: Path, tmp_path: Path) -> None:
    process = started("--config", config, "--run_dir", tmp_path / "run", "--trainer.devices", "2")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert out.count("round 2/2 unit 7/7 conv_out") == 1
    assert_same(tmp_path / "run", undisturbed_pair)


@pytest.mark.slow
def test_torchrun(config: Path, undisturbed_pair: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = started("--config", config, "--run_dir", tmp_path / "run", launcher=launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("round 2/2 unit 7/7 conv_out") == 1
    assert_same(tmp_path / "run", undisturbed_pair)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "number", "code", "words"),
    [
        ("child", signal.SIGKILL, 75, "error: process 1 of this node was ended by SIGKILL; the same command"),
        ("child", signal.SIGTERM, 143, ""),
        ("parent", signal.SIGKILL, -9, "error: rank 0 of this run is gone; the same command"),
        ("parent", signal.SIGTERM, 143, ""),
        ("parent", signal.SIGINT, 130, ""),
    ],
)
def test_one_of_the_processes_is_ended(
    config: Path, undisturbed_pair: Path, tmp_path: Path, whom: str, number: int, code: int, words: str
) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run", "--trainer.devices", "2")
    process = started(*args)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1/2 unit 3/7"):
            break
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if whom == "parent" else int(child), number)
    _, err = process.communicate(timeout=120)  # ends when neither process holds the pipe any more
    assert process.returncode == code
    assert err.startswith(words)
    assert err.count("\n") == (1 if words else 0), err
    again = started(*args)
    assert (again.communicate(timeout=300)[1], again.returncode) == ("", 0)
    assert_same(tmp_path / "run", undisturbed_pair)
