"""The same command again goes on where the last one stopped, however it stopped, and ends in the same bits."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tcaq_lightning.runtime.files import load_tensors
from tests.train.conftest import Command, Settings, changed, contents

STEP = "tcaq_lightning.calibration.reconstruction:BlockReconstruction.on_train_batch_start"
OBSERVE = "tcaq_lightning.calibration.observation:UnitObservation.predict_step"
SAMPLE = "diffusers:DDIMScheduler.step"
RENAME = "os:replace"
STORE = "tcaq_lightning.calibration.streams:Streams.store"
SAVE = "tcaq_lightning.calibration.rounds:finish_unit"
CHECKPOINT = "tcaq_lightning.runtime.files:CheckedCheckpointIO.save_checkpoint"
CHECKSUMS = "tcaq_lightning.artifact.directory:write_checksums"
PLACE = "pathlib:Path.rename"
BATCH = "tcaq_lightning.evaluation.batches:save_tensors"
REPORT = "tcaq_lightning.reports.markdown:write_json"

# In the order in which a run comes by. A step's number counts from where the killed process began.
MOMENTS = [
    (RENAME, 1),  # the manifest
    (SAMPLE, 2),  # trajectories
    (RENAME, 3),  # trajectories, written but not in place
    (RENAME, 4),  # the weights of errors
    (OBSERVE, 1),
    (STEP, 3),  # r phase
    (CHECKPOINT, 2),  # V phase
    (STEP, 8),
    (SAVE, 1),  # a unit
    (STORE, 2),  # between units
    (STEP, 60),
    (SAMPLE, 2),  # mismatch after round 0
    (SAMPLE, 5),  # trajectories of round 1
    (STEP, 7),  # round 1
    (CHECKPOINT, 7),
    (CHECKSUMS, 1),  # the artifact
    (PLACE, 1),
    (BATCH, 2),  # evaluation
    (REPORT, 1),
]


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a run computes: the artifact's bytes, all states and trajectories, all figures but of the work done."""
    values: dict[str, Any] = dict(contents(run_dir / "quantized"))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for record in [metrics, *metrics["units"], *metrics["rounds"]]:
        del record["seconds"]
    del metrics["stages"], metrics["peak_memory"]
    values["metrics.json"] = metrics
    for file in sorted([*run_dir.glob("rounds/**/*.safetensors"), *run_dir.glob("calibration/*")]):
        name = file.relative_to(run_dir).as_posix()
        values |= {f"{name} {k}": v.numpy().tobytes() for k, v in load_tensors(file)[0].items()}
    return values


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    got, expected = outcome(run_dir), outcome(undisturbed)
    assert got.keys() == expected.keys()
    assert [k for k in got if got[k] != expected[k]] == []
    assert not list(run_dir.rglob("*.ckpt"))
    assert not list(run_dir.rglob(".*"))


@pytest.mark.parametrize("moments", [MOMENTS[2::3], pytest.param(MOMENTS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed_everywhere(
    command: Command, config: Path, undisturbed: Path, tmp_path: Path, moments: list[tuple[str, int]]
) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run")
    for target, number in moments:
        assert command(*args, fault=(target, number, "SIGKILL")).code == -9, (target, number)
    ended = command(*args)
    assert (ended.code, ended.err) == (0, "")
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_killed_with_patience(command: Command, config: Path, tmp_path: Path) -> None:
    """Phases that end early are resumed to the same bits too."""
    args = ("--config", config, "--reconstruction.patience", "1", "--par.enabled", "false")
    assert command(*args, "--run_dir", tmp_path / "undisturbed").code == 0
    for number in (7, 20):
        assert command(*args, "--run_dir", tmp_path / "run", fault=(STEP, number, "SIGKILL")).code == -9
    assert command(*args, "--run_dir", tmp_path / "run").code == 0
    assert_same(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.slow
def test_killed_with_quantized_outputs(command: Command, config: Path, tmp_path: Path) -> None:
    """Their ranges are part of a unit's state."""
    args = ("--config", config, "--quantization.integer_ready", "true", "--par.enabled", "false")
    assert command(*args, "--run_dir", tmp_path / "undisturbed").code == 0
    for number in (3, 12, 40):  # r phase, V phase, a later unit
        assert command(*args, "--run_dir", tmp_path / "run", fault=(STEP, number, "SIGKILL")).code == -9
    assert command(*args, "--run_dir", tmp_path / "run").code == 0
    assert_same(tmp_path / "run", tmp_path / "undisturbed")
    entries = json.loads((tmp_path / "run/quantized/unet/config.json").read_text())["quantization_config"]["layers"]
    quantized = {name for name, entry in entries.items() if entry.get("quantized_output")}
    assert quantized == {n for n, entry in entries.items() if entry["kind"] == "Conv2d"} - {"conv_out"}


@pytest.mark.slow
@pytest.mark.parametrize(("target", "number"), [*MOMENTS, (STEP, 90), (STEP, 130), (CHECKPOINT, 20), (SAVE, 12)])
def test_killed_once(
    command: Command, config: Path, undisturbed: Path, tmp_path: Path, target: str, number: int
) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run")
    assert command(*args, fault=(target, number, "SIGKILL")).code == -9
    assert command(*args).code == 0
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random(command: Command, config: Path, undisturbed: Path, tmp_path: Path, seed: int) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run")
    rng = random.Random(seed)
    for _ in range(4):
        assert command(*args, kill_after=rng.uniform(0.3, 3)).code in {-9, 0}
    assert command(*args).code == 0
    assert_same(tmp_path / "run", undisturbed)


def test_ctrl_c_twice_within_a_fit(command: Command, config: Path, tmp_path: Path) -> None:
    ended = command("--config", config, "--run_dir", tmp_path / "run", fault=(STEP, 3, "SIGINT,SIGINT"))
    assert (ended.code, ended.err) == (130, "")
    assert not list((tmp_path / "run").rglob(".*.tmp"))


@pytest.mark.parametrize(
    ("first", "every"),
    [(0, False), *(pytest.param(first, True, marks=pytest.mark.slow) for first in (0, 1))],
)
def test_stopped_politely(
    command: Command, config: Path, undisturbed: Path, tmp_path: Path, first: int, every: bool
) -> None:
    args = ("--config", config, "--run_dir", tmp_path / "run")
    codes = {"SIGTERM": 143, "SIGINT": 130}
    moments = [(SAMPLE, 2), (RENAME, 3), (OBSERVE, 1), (STEP, 3), (STEP, 9), (CHECKPOINT, 5), (STORE, 9)]
    moments += [(CHECKSUMS, 1), (BATCH, 1), (REPORT, 1)]
    for i, (target, number) in list(enumerate(moments))[slice(None) if every else slice(0, None, 3)]:
        name, code = list(codes.items())[(i + first) % 2]
        ended = command(*args, fault=(target, number, name))
        assert (ended.code, ended.err) == (code, ""), (target, number)
        assert "Traceback" not in ended.out
        assert not list(tmp_path.rglob(".*")), (target, number)
    assert command(*args).code == 0
    assert_same(tmp_path / "run", undisturbed)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, truncate])
def test_damaged_files_are_made_again(
    command: Command, config: Path, undisturbed: Path, almost_done: Path, damage: Any
) -> None:
    files = [
        almost_done / "calibration" / "trajectories.safetensors",
        almost_done / "calibration" / "sensitivities.safetensors",
        almost_done / "rounds" / "00" / "held_out.safetensors",
        almost_done / "rounds" / "01" / "trajectories.safetensors",
        sorted(almost_done.glob("rounds/00/units/*"))[3],
        min(almost_done.glob("rounds/01/units/*")),
        sorted(almost_done.glob("evaluation/*/*"))[1],
    ]
    for file in files:
        damage(file)
    ended = command("--config", config, "--run_dir", almost_done)
    assert ended.code == 0
    lines = ended.err.splitlines()
    assert len(lines) == len(files)
    for file in files:
        assert any(str(file) in line and "damaged" in line for line in lines)
    assert_same(almost_done, undisturbed)


@pytest.mark.parametrize(("number", "kind", "damage"), [(3, "r", truncate), (8, "v", flip)], ids=["r", "v"])
def test_damaged_checkpoints(
    command: Command, config: Path, undisturbed: Path, almost_done: Path, number: int, kind: str, damage: Any
) -> None:
    for file in almost_done.glob("rounds/00/units/*"):
        if not file.name.startswith("000"):
            file.unlink()
    args = ("--config", config, "--run_dir", almost_done, "--trainer.checkpoint_every", "1")
    assert command(*args, fault=(STEP, number, "SIGKILL")).code == -9
    files = sorted(almost_done.rglob(f"*-{kind}.ckpt"))
    assert files
    for file in files:
        damage(file)
    ended = command(*args)
    assert ended.code == 0
    assert [str(file) in line for file, line in zip(reversed(files), ended.err.splitlines(), strict=True)]
    assert_same(almost_done, undisturbed)


@pytest.mark.parametrize("damage", [flip, truncate, empty])
def test_damaged_manifest(command: Command, config: Path, almost_done: Path, damage: Any) -> None:
    manifest = almost_done / "manifest.json"
    damage(manifest)
    before = contents(almost_done)
    ended = command("--config", config, "--run_dir", almost_done)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert str(almost_done) in ended.err
    assert contents(almost_done) == before


def test_settings_without_influence_may_change(
    command: Command, config: Path, undisturbed: Path, almost_done: Path
) -> None:
    changes = ("--trainer.checkpoint_every", "7", "--logging.grid_images", "2", "--logging.tensorboard", "true")
    moved = almost_done.with_name("moved")
    shutil.move(almost_done, moved)
    assert command("--config", config, "--run_dir", moved, *changes).code == 0
    assert_same(moved, undisturbed)


def test_other_settings_may_not(command: Command, settings: Settings, almost_done: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(changed(settings, "quantization.weight.bits", 6)))
    before = contents(almost_done)
    ended = command("--config", other, "--run_dir", almost_done)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert all(word in ended.err for word in ("quantization.weight.bits", "6", "4", str(almost_done)))
    assert contents(almost_done) == before


def test_stopping_after_a_unit_is_a_part_of_the_same_run(
    command: Command, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    args = ("--config", config, "--run_dir", run_dir)
    for last in ("conv_in", "down_blocks.0.attentions.0", "conv_in"):
        ended = command(*args, "--trainer.stop_after", last)
        assert (ended.code, ended.err) == (0, "")
        assert f"stopped after {last}" in ended.out
    names = [path.stem.split("-", 1)[1] for path in sorted(run_dir.glob("rounds/00/units/*"))]
    assert names[-1] == "down_blocks.0.attentions.0"
    assert len(names) < 7
    assert not (run_dir / "quantized").exists()
    assert command(*args).code == 0
    assert_same(run_dir, undisturbed)


def test_a_unit_to_stop_after_that_is_none(command: Command, config: Path, tmp_path: Path) -> None:
    ended = command("--config", config, "--run_dir", tmp_path / "run", "--trainer.stop_after", "down_blocks.0.attn")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert all(word in ended.err for word in ("trainer.stop_after", "down_blocks.0.attn", "down_blocks.0.attentions.0"))
    assert not (tmp_path / "run").exists()


def test_a_unit_file_that_is_damaged_before_the_next_round_reads_it(
    command: Command, config: Path, undisturbed: Path, almost_done: Path
) -> None:
    """The logits that a later round starts from are in the files alone."""
    for file in almost_done.glob("rounds/01/units/*"):
        file.unlink()
    args = ("--config", config, "--run_dir", almost_done)
    assert command(*args, fault=(STORE, 4, "SIGKILL")).code == -9  # in round 1
    damaged = min(almost_done.glob("rounds/00/units/*"))
    flip(damaged)
    assert command(*args).code == 0
    assert_same(almost_done, undisturbed)
