"""A TensorBoard writer that goes on with the event files of earlier commands of the run."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as summaries_of_hparams

PATTERN = "events.out.tfevents.*"
_LENGTH, _CHECK = struct.Struct("<Q"), struct.Struct("<I")


class EventLog(SummaryWriter):
    """`SummaryWriter` that writes a step of a tag once in a run, however often the run was interrupted.

    A command that goes on from a checkpoint does some steps again, with the same values: those that are in the files of
    earlier commands are left out. What an earlier command was writing when it was killed is cut off.

    Args:
        directory: of the run's event files; no other process may write there.
    """

    def __init__(self, directory: Path) -> None:
        files = sorted(directory.glob(PATTERN))
        self._written = {place for file in files for place in _places(file)}
        _wait_for_a_later_name(files)
        super().__init__(str(directory))
        writer: Any = self.file_writer
        write = writer.add_summary

        def write_once(summary: Summary, global_step: int | None = None, walltime: float | None = None) -> None:
            fresh = [v for v in summary.value if (v.tag, global_step or 0) not in self._written]
            if fresh:
                self._written.update((v.tag, global_step or 0) for v in fresh)
                write(Summary(value=fresh), global_step, walltime)

        writer.add_summary = self._write_once = write_once

    def add_outcome(self, settings: dict[str, Any], figures: dict[str, float]) -> None:
        """Write a run's settings and final figures, for HParams, among its other events.

        Args:
            settings: booleans, numbers and texts by name.
            figures: by name.
        """
        for summary in summaries_of_hparams(settings, figures):  # type: ignore[no-untyped-call]
            self._write_once(summary)
        for name, value in figures.items():
            self.add_scalar(name, value)


def _places(file: Path) -> Iterator[tuple[str, int]]:
    """(tag, step) of everything in an event file, from whose end a record that is not whole is cut off."""
    content = file.read_bytes()
    records = _records(content)
    for start, end in records:
        event = Event.FromString(content[start:end])
        yield from ((value.tag, event.step) for value in event.summary.value)
    whole = records[-1][1] + _CHECK.size if records else 0
    if whole < len(content):
        with file.open("r+b") as stream:
            stream.truncate(whole)


def _records(content: bytes) -> list[tuple[int, int]]:
    """Where the whole records of a file begin and end (TFRecord: length, its checksum, data, theirs)."""
    found: list[tuple[int, int]] = []
    place = 0
    while place + _LENGTH.size + _CHECK.size <= len(content):
        (size,) = _LENGTH.unpack_from(content, place)
        start = place + _LENGTH.size + _CHECK.size
        end = start + size
        if end + _CHECK.size > len(content):
            break
        found.append((start, end))
        place = end + _CHECK.size
    if found and _CHECK.unpack_from(content, found[-1][1])[0] != masked_crc32c(content[slice(*found[-1])]):
        found.pop()  # only the last one can be torn
    return found


def _wait_for_a_later_name(files: list[Path]) -> None:
    """Readers take the files by name, in which the second stands when they were begun."""
    newest = max((int(file.name.split(".")[3]) for file in files), default=0)
    while int(time.time()) <= newest:
        time.sleep(0.05)
