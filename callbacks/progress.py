"""One progress bar over rounds and units; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tcaq_lightning.calibration.callback import CalibrationCallback
from tcaq_lightning.calibration.reconstruction import BlockReconstruction
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.models.trajectories import Trajectories


@contextmanager
def counting(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar over samples, or a plain line where there is no terminal; gives the function that advances it.

    Args:
        console: where to draw.
        label: what is counted.
        total: number of samples.
    """
    if not console.is_terminal:
        console.print(f"{label}: {total} samples")
    bar = _bar(console)
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def _bar(console: Console) -> Bar:
    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class Progress(CalibrationCallback):
    """The run's progress, counted in optimisation steps over all rounds and units.

    Args:
        console: where to draw.
        steps_by_round: optimisation steps of one unit in each round.
        num_units: units in a round.
    """

    def __init__(self, console: Console, steps_by_round: list[int], num_units: int) -> None:
        self.console = console
        self.steps_by_round = steps_by_round
        self.num_units = num_units
        self.done = 0
        self.started = time.monotonic()
        self.bar = _bar(console)
        # a unit without optimisation still counts one step: it is observed, set and propagated
        self.weights = [max(1, steps) for steps in steps_by_round]
        self.task = self.bar.add_task("calibrating", total=sum(self.weights) * num_units)
        self._base = 0

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def on_unit_start(self, visit: Visit) -> None:
        """Show the unit."""
        before, here = sum(self.weights[: visit.round_index]), self.weights[visit.round_index]
        self._base = before * self.num_units + here * visit.position
        label = f"round {visit.round_index + 1}/{len(self.weights)}  unit {visit.position + 1}/{self.num_units}"
        label += f"  {visit.name}"
        self.bar.update(self.task, completed=self._base, description=label)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Advance by a step; a unit's phases follow each other."""
        assert isinstance(pl_module, BlockReconstruction)
        self.bar.update(self.task, completed=min(self._base + pl_module.steps_before + trainer.global_step, self.total))

    @property
    def total(self) -> int:
        """Optimisation steps of the whole calibration."""
        return sum(self.weights) * self.num_units

    def on_unit_end(self, visit: Visit, record: dict[str, Any]) -> None:
        """Advance to the unit's end, and write a line where there is no terminal."""
        completed = self._base + self.weights[visit.round_index]
        self.bar.update(self.task, completed=completed)
        if not self.console.is_terminal:
            elapsed = time.monotonic() - self.started
            left = elapsed / completed * (self.total - completed)
            self.console.print(
                f"round {visit.round_index + 1}/{len(self.weights)} unit {visit.position + 1}/{self.num_units} "
                f"{visit.name}: "
                f"held-out error {record['before']:.4g} -> {record['after']:.4g}"
                f"{'' if record['kept'] else ' (kept as before)'}, {elapsed:.0f} s, about {left:.0f} s left",
                soft_wrap=True,
            )

    def on_round_end(self, round_index: int, record: dict[str, Any], samples: Trajectories) -> None:
        """Write the round's mismatch."""
        note = "" if record["kept"] else "; it did not fall, so the state before the round is kept"
        self.console.print(
            f"round {round_index + 1}: mean held-out mismatch {record['mean_mismatch']:.4g}{note}", soft_wrap=True
        )
