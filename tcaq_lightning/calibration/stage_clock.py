"""What the stages of a unit's calibration take, over all commands that take part in it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.runtime.memory import release_freed_memory

Spent = dict[str, dict[str, float]]
"""`seconds` and `executions` by stage, JSON-ready."""


class StageClock:
    """Seconds by stage, and on how many samples a unit ran in each.

    Args:
        data: the unit's samples, which count its runs.
    """

    def __init__(self, data: UnitData) -> None:
        self.data = data
        self.seconds: dict[str, float] = {}
        self.executions: dict[str, int] = {}
        self._running: tuple[str, float, int] | None = None

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what is done within to a stage."""
        self._running = stage, time.perf_counter(), self.data.executed
        yield
        release_freed_memory()  # else what one stage has freed lies beside what the next one takes
        self._count()
        self._running = None

    def learning(self) -> Spent:
        """What the learning stages have taken so far, the running one included: for a checkpoint."""
        self._count()
        return {
            "seconds": {stage: value for stage, value in self.seconds.items() if stage.startswith("learn")},
            "executions": {stage: value for stage, value in self.executions.items() if stage.startswith("learn")},
        }

    def go_on_from(self, spent: Mapping[str, Mapping[str, float]]) -> None:
        """Add what earlier commands have spent up to the checkpoint that this one goes on from."""
        for stage, seconds in spent["seconds"].items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        for stage, count in spent["executions"].items():
            self.executions[stage] = self.executions.get(stage, 0) + int(count)

    def _count(self) -> None:
        """Add what the running stage has taken since it was last counted."""
        if self._running is None:
            return
        stage, started, executed = self._running
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - started
        self.executions[stage] = self.executions.get(stage, 0) + self.data.executed - executed
        self._running = stage, now, self.data.executed
