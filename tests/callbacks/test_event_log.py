from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event

from callbacks import EventLog


def events(directory: Path) -> dict[str, list[int]]:
    """Steps by tag in the order of the files, read record by record."""
    found: dict[str, list[int]] = defaultdict(list)
    for file in sorted(directory.glob("events.out.tfevents.*")):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + size])
            for value in event.summary.value:
                found[value.tag].append(event.step)
            place += 16 + size
        assert place == len(content)  # whole records alone
    return dict(found)


def write(directory: Path, steps: range) -> None:
    with EventLog(directory) as log:
        for step in steps:
            log.add_scalar("loss", 1.0 / (1 + step), step)
        log.add_histogram("r", torch.arange(4.0), 0)
        log.add_scalar("once", 3.0)


def test_steps_that_are_done_again_are_written_once(tmp_path: Path) -> None:
    for steps in (range(5), range(3, 9), range(9)):
        write(tmp_path, steps)
    assert events(tmp_path) == {"loss": list(range(9)), "r": [0], "once": [0]}
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, round(e.value, 6)) for e in accumulator.Scalars("loss")] == [
        (step, round(1 / (1 + step), 6)) for step in range(9)
    ]


@pytest.mark.parametrize("lost", [1, 5, 20, 40])
def test_a_record_that_was_being_written_is_cut_off(tmp_path: Path, lost: int) -> None:
    with EventLog(tmp_path) as log:
        for step in range(6):
            log.add_scalar("loss", float(step), step)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-lost])
    write(tmp_path, range(4, 8))
    assert events(tmp_path)["loss"] == sorted(events(tmp_path)["loss"])
    assert set(events(tmp_path)["loss"]) >= {0, 1, 2, 3, 5, 6, 7}
    assert len(events(tmp_path)["loss"]) == len(set(events(tmp_path)["loss"]))


def test_the_outcome_is_written_once(tmp_path: Path) -> None:
    for _ in range(2):
        with EventLog(tmp_path) as log:
            log.add_outcome({"bits": 4}, {"final/noise_error": 0.5})
    assert events(tmp_path)["final/noise_error"] == [0]
    assert all(len(steps) == 1 for steps in events(tmp_path).values())
    assert EventAccumulator(str(tmp_path)).Reload().Scalars("final/noise_error")[0].value == 0.5
