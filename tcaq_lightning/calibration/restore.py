"""Finished units on disk: written when a unit is in its final state of a round, and put back from there."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor, nn

from tcaq_lightning.calibration.run_files import RunFile, RunFiles
from tcaq_lightning.calibration.state import Record
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.state import check_quantization_state, quantization_state, restore_quantization_state, settle
from tcaq_lightning.runtime.distributed.collectives import broadcast, on_main
from tcaq_lightning.runtime.files import DamagedFileError
from tcaq_lightning.runtime.json_shape import FLAG, NUMBER, TEXT, Named, check_shape
from tcaq_lightning.runtime.one_line import one_line

log = logging.getLogger(__name__)

RECORD = {
    "round": NUMBER,
    "position": NUMBER,
    "unit": TEXT,
    "kept": FLAG,
    "before": NUMBER,
    "after": NUMBER,
    "flipped": NUMBER,
    "samples": NUMBER,
    "seconds": Named(NUMBER),
    "executions": Named(NUMBER),
}
"""What the record of a finished unit must hold."""


def finish_unit(unit: nn.Module, visit: Visit, record: Record, files: RunFiles) -> Record:
    """Write a unit's final state and record, those of rank 0, which every rank has afterwards.

    Args:
        unit: quantized unit; its rounding is settled.
        visit: which one.
        record: what was done with it.
        files: where the run keeps its files.

    Returns:
        The record of rank 0.
    """
    state, record = broadcast((quantization_state(unit), record))
    restore_quantization_state(unit, state)

    def write() -> None:
        files.unit(visit).save(state, record)
        for phase in ("r", "v"):
            files.checkpoint(visit, phase).path.unlink(missing_ok=True)

    on_main(write)
    settle(unit)
    return record


def restored(unit: nn.Module, visit: Visit, files: RunFiles) -> Record | None:
    """Put a finished unit's state back, settled, and return its record.

    Args:
        unit: quantized unit.
        visit: which one.
        files: where the run keeps its files.

    Returns:
        None if the unit is not finished or its file is damaged.
    """
    record = _put_back(unit, visit, files)
    if record is not None:
        settle(unit)
    return record


def reopen(unit: nn.Module, visit: Visit, files: RunFiles) -> None:
    """Give a unit the state in which a round left it, with its rounding logits, which are kept on disk alone.

    Args:
        unit: quantized unit.
        visit: which one, and of which round.
        files: where the run keeps its files.

    Raises:
        UserError: the unit's file is damaged.
    """
    if _put_back(unit, visit, files) is None:
        raise UserError(
            f"{files.unit(visit).path} was damaged while the run went on; the same command does the unit again"
        )


def warn_of_damage(path: Path, error: Exception) -> None:
    """Say that a file of the run is not used."""
    reason = error if isinstance(error, DamagedFileError) else f"{path} does not fit the unit: {one_line(error)}"
    log.warning("%s; the unit is done again", reason)


def _put_back(unit: nn.Module, visit: Visit, files: RunFiles) -> Record | None:
    """Put a unit's state back as its file has it, and return its record; None without a file, or of a damaged one."""
    found = on_main(lambda: _stored_unit(files.unit(visit), unit))
    if found is None:
        return None
    state, record = found
    restore_quantization_state(unit, state)
    return record


def _stored_unit(file: RunFile, unit: nn.Module) -> tuple[dict[str, Tensor], Record] | None:
    if not file.exists():
        return None
    try:
        state, record = file.load()
        check_quantization_state(unit, state)
        check_shape(record, RECORD, "its record")
    except (DamagedFileError, KeyError, ValueError) as error:
        warn_of_damage(file.path, error)
        return None
    return state, dict(record)
