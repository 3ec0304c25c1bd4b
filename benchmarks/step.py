"""One optimisation step against the same unit's plain float32 training step.

    python -m benchmarks.step --threads 1
    python -m benchmarks.step --model ddpm-cifar10-32 --threads 2

A real calibration runs, and every fit in it is done several times, alternating with the limit: the unit's
full-precision twin, forward, backward to its weights and Adam, on a batch of the same size that is at hand, attention
computed in the open. A step lasts from the end of the step before it to its own end: drawing and reading the batch,
Lightning's loop, and the update are in it.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytorch_lightning as pl
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from benchmarks.common import SHIPPED, calibration, median, model_path, run, train_here
from tcaq_lightning.calibration import unit as unit_calibration
from tcaq_lightning.calibration.fit import PreparedUnit, fit_unit
from tcaq_lightning.calibration.losses import block_error
from tcaq_lightning.calibration.reconstruction import Phase
from tcaq_lightning.calibration.stage_clock import StageClock
from tcaq_lightning.calibration.state import Setup
from tcaq_lightning.calibration.unit_data import Batch
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.nn.state import quantization_state, restore_quantization_state
from tcaq_lightning.runtime.memory import freed_memory_reused
from tcaq_lightning.runtime.precision import autocasts


class StepTimes(pl.Callback):
    """Seconds from the end of a step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ends = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of every step but the first."""
        return [after - before for before, after in pairwise(self.ends)]


class PlainTraining:
    """The limit: float32 training of a unit's weights on one batch."""

    def __init__(self, unit: nn.Module, batch: Batch) -> None:
        self.unit, self.batch = copy.deepcopy(unit), batch
        for module in self.unit.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
        layers = [m for m in self.unit.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.optimizer = torch.optim.Adam([m.weight.requires_grad_() for m in layers], lr=1e-4, foreach=True)

    def step(self) -> Tensor:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        loss = block_error(self.unit(*self.batch.args, **self.batch.kwargs), self.batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss

    def seconds(self, steps: int) -> list[float]:
        """Of every step but the first."""
        ends = []
        with freed_memory_reused(True):  # as the tool does: to get large blocks from the system anew is no training
            for _ in range(steps):
                self.step()
                ends.append(time.perf_counter())
        return [after - before for before, after in pairwise(ends)]


class Comparison:
    """Takes the place of `fit_unit`: times each fit against the limit.

    Attributes:
        times: by phase and unit, seconds of the (tool's, limit's) steps.
        every: not all steps are alike: so many in a row are a period.
    """

    def __init__(self, fit_unit: Callable[..., float], batch_size: int, repetitions: int) -> None:
        self.fit_unit, self.batch_size, self.repetitions = fit_unit, batch_size, repetitions
        self.times: dict[str, dict[str, tuple[list[float], list[float]]]] = defaultdict(dict)
        self.every, self.counted = 1, 0

    def __call__(
        self,
        setup: Setup,
        visit: Visit,
        prepared: PreparedUnit,
        phase: Phase,
        iterations: int,
        clock: StageClock,
        callbacks: Sequence[pl.Callback] = (),
    ) -> float:
        times, undecided, train = StepTimes(), 0.0, prepared.train
        chosen = train[torch.arange(self.batch_size) % len(train)]
        batch = prepared.data.read(chosen, setup.device)
        plain = PlainTraining(setup.full.get_submodule(visit.name), batch)
        before = quantization_state(prepared.unit)
        ours, limit = self.times[phase].setdefault(visit.name, ([], []))
        for _ in range(self.repetitions):
            limit += plain.seconds(iterations)
            restore_quantization_state(prepared.unit, before)
            undecided = self.fit_unit(setup, visit, prepared, phase, iterations, clock, [*callbacks, times])
            ours += times.seconds
        self.every, self.counted = setup.config.reconstruction.input_steps_every, iterations - 1
        return undecided

    def _typical(self, seconds: list[float]) -> float:
        """Mean over a period of the medians at each of its places."""
        places: dict[int, list[float]] = defaultdict(list)
        for number, step in enumerate(seconds):
            places[(number % self.counted + 1) % self.every].append(step)  # the first step of a fit is not counted
        medians = [median(steps) for steps in places.values()]
        return sum(medians) / len(medians)

    def summary(self) -> dict[str, Any]:
        """By phase: milliseconds of a step of all units, their ratio, and the unit with the largest one."""
        phases = {}
        for phase, units in self.times.items():
            medians = {name: (self._typical(ours), median(limit)) for name, (ours, limit) in units.items()}
            ours, limit = (sum(m[side] for m in medians.values()) for side in (0, 1))
            worst = max(medians, key=lambda name: medians[name][0] / medians[name][1])
            phases[phase] = {
                "ratio": ours / limit,
                "step_ms": 1e3 * ours,
                "limit_ms": 1e3 * limit,
                "worst_unit": worst,
                "worst_ratio": medians[worst][0] / medians[worst][1],
                "units": {name: a / b for name, (a, b) in medians.items()},
            }
        return phases


def step(
    model: str = SHIPPED,
    threads: int = 1,
    steps: int = 20,
    repetitions: int = 3,
    batch_size: int = 32,
    trajectories: int = 4,
    sampler_steps: int = 20,
    autocast: bool | Literal["auto"] = "auto",
    compiled: bool = False,
) -> dict[str, Any]:
    """Time an optimisation step of all units against their plain training step.

    Args:
        model: shipped model, model of random weights, or directory.
        threads: CPU threads.
        steps: of each fit and phase, the first of which is not counted.
        repetitions: fits of each unit and phase, alternating with the limit.
        batch_size: samples a step.
        trajectories: calibration trajectories.
        sampler_steps: samples of each, and timestep groups.
        autocast: of the tool's steps; the limit is in float32.
        compiled: the units, with torch.compile; the limit stays as it is.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = model_path(model, directory)
        settings = calibration(
            directory / "run", path, threads, trajectories, 1, sampler_steps, 2 * steps, batch_size
        ) | {
            "par.enabled": False,
            "tcr.share": 0.5,
            "reconstruction.autocast": autocast,
            "reconstruction.compile": compiled,
        }
        comparison = Comparison(fit_unit, batch_size, repetitions)
        with mock.patch.object(unit_calibration, "fit_unit", comparison):
            train_here(settings)
    narrow = autocasts(autocast, torch.device("cpu"), torch.float32)
    settled = {"model": model, "threads": threads, "batch_size": batch_size, "compiled": compiled}
    return settled | {"products": "bfloat16" if narrow else "float32"} | {"phases": comparison.summary()}


if __name__ == "__main__":
    run(step)
