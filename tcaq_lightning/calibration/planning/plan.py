"""The plan that is shown before work: units, bits, what is kept, data, memory, time."""

from __future__ import annotations

import dataclasses
import difflib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from tcaq_lightning.calibration.planning.cost import (
    DEVICE_TFLOPS,
    RANK_EFFICIENCY,
    calibration_passes,
    evaluation_passes,
    forward_flops,
    seconds_on_devices,
)
from tcaq_lightning.calibration.planning.footprint import Footprint, TrialWork, measure_footprint, unit_samples
from tcaq_lightning.calibration.storage import GIGABYTE, Tier, free_disk, resolve_limits
from tcaq_lightning.calibration.streams import TensorKind, store_peaks
from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.config import Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.denoiser_calls import Samples
from tcaq_lightning.models.graph import UnitGraph
from tcaq_lightning.nn.coverage import KEPT_BY_RULE, UNKNOWN_ATTENTION, CoverageRow
from tcaq_lightning.runtime.distributed.collectives import world_size
from tcaq_lightning.runtime.json_shape import NUMBER, Named, check_shape
from tcaq_lightning.runtime.memory import available_memory

LONGEST = 90 * 86400
"""Seconds of a run that anybody waits for."""
MOST_TIMED = 64
"""Samples of the pass that is timed."""


@dataclass(frozen=True)
class Plan:
    """What a run is going to do.

    Attributes:
        processes: number of processes that share the run.
        units: number of units.
        samples: calibration samples, held-out ones included.
        layers: number of rows of the coverage table, by bits.
        kept: names kept in full precision by rule.
        steps: optimisation steps over all units, phases and rounds.
        store_bytes: largest size of one process' activation store, by tier.
        limits: bytes that the store may take, by tier.
        model_bytes: the full-precision pipeline, and what the quantized denoiser has beside its weights: codes, tables.
        workspace_bytes: what work takes beside models and store, by its kind; one kind is done at a time.
        seconds: estimated duration of the calibration.
        evaluation_seconds: estimated duration of the denoiser's calls in the evaluation after it.
        trajectory_bytes: of the trajectories' files.
        image_bytes: of the images that are compared.
    """

    processes: int
    units: int
    samples: int
    layers: dict[str, int]
    kept: list[str]
    steps: int
    store_bytes: dict[Tier, int]
    limits: dict[Tier, float]
    model_bytes: int
    workspace_bytes: dict[str, int]
    seconds: float
    evaluation_seconds: float
    trajectory_bytes: int
    image_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self)

    def check(self, directory: Path) -> None:
        """See before the work that this machine can do it.

        Args:
            directory: where the run writes.

        Raises:
            UserError: it takes more memory than there is, more files than there is room for, or absurdly long.
        """
        if (total := self.seconds + self.evaluation_seconds) > LONGEST:
            lower = (
                "evaluation.num_images, evaluation.fid_samples, evaluation.num_trajectories or "
                "evaluation.sampler.num_steps"
                if self.evaluation_seconds > self.seconds
                else "calibration.num_trajectories, calibration.mismatch_trajectories, calibration.sampler.num_steps "
                "or reconstruction.iterations"
            )
            raise UserError(
                f"the plan takes about {duration(total)}, more than {LONGEST / 86400:.0f} days, of which the "
                f"evaluation takes {duration(self.evaluation_seconds)}; lower {lower}"
            )
        needed = max(max(self.workspace_bytes.values()) + self.store_bytes["host"], self.image_bytes)
        room = available_memory()
        if self.limits["device"] == 0 and needed > room:
            raise UserError(
                f"the plan takes {needed / GIGABYTE:.3g} GB of memory, of which {room / GIGABYTE:.3g} GB are "
                "available; lower calibration.batch_size, reconstruction.batch_size, evaluation.batch_size, "
                "evaluation.num_images, the numbers of trajectories, or calibration.memory_budget.host"
            )
        begun = (directory / "calibration").exists()  # the trajectories are there already
        files, free = self.store_bytes["disk"] + (0 if begun else self.trajectory_bytes), free_disk(directory)
        if files > free:
            raise UserError(
                f"the plan takes {files / GIGABYTE:.3g} GB in {directory}, where {free / GIGABYTE:.3g} GB are free; "
                "free space, choose another run_dir, or lower the numbers of trajectories"
            )

    def table(self) -> Table:
        """For the console."""
        table = Table(title="plan", show_header=False, title_justify="left")
        bits = ", ".join(f"{count} x {label}" for label, count in self.layers.items())
        tiers = [f"{tier} {nbytes / GIGABYTE:.2f}" for tier, nbytes in self.store_bytes.items() if nbytes]
        if self.processes > 1:
            table.add_row("processes", f"{self.processes}; memory is that of each")
        table.add_row("units", str(self.units))
        table.add_row("layers and matmuls", bits)
        table.add_row("kept in full precision", ", ".join(self.kept) or "nothing but norms")
        table.add_row("calibration samples", str(self.samples))
        table.add_row("optimisation steps", str(self.steps))
        table.add_row("stored activations", f"{', '.join(tiers)} GB")
        table.add_row("model and codes", f"{self.model_bytes / GIGABYTE:.2f} GB")
        kind, workspace = max(self.workspace_bytes.items(), key=lambda item: item[1])
        table.add_row("workspace", f"{workspace / GIGABYTE:.2f} GB (most in: {kind})")
        table.add_row("time", f"about {duration(self.seconds)}, then {duration(self.evaluation_seconds)} of evaluation")
        return table


def duration(seconds: float) -> str:
    """Seconds in the unit that fits.

    >>> duration(80), duration(600), duration(20000)
    ('80 s', '10 min', '5.6 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def check_stop(config: Config, units: Sequence[str]) -> None:
    """Check that `trainer.stop_after` names a unit.

    Args:
        config: the run's configuration.
        units: names of the model's units.

    Raises:
        UserError: it does not.
    """
    last = config.trainer.stop_after
    if last is not None and last not in units:
        near = difflib.get_close_matches(last, units, n=1, cutoff=0) or units[:1]
        raise UserError(
            f"trainer.stop_after: {last!r} is no unit of the model; expected one such as {near[0]}, or null"
        )


def make_plan(
    config: Config,
    denoiser: nn.Module,
    others: Mapping[str, nn.Module],
    graph: UnitGraph,
    coverage: list[CoverageRow],
    probe: Samples,
    calls: int,
    earlier: Mapping[str, Any] | None = None,
) -> Plan:
    """Count, measure what memory work takes, and time one forward pass of the full-precision denoiser.

    Args:
        config: the run's configuration.
        denoiser: full precision.
        others: the pipeline's other networks.
        graph: units in execution order.
        coverage: the coverage table.
        probe: calibration-like inputs, any number.
        calls: denoiser calls of one trajectory.
        earlier: plan of an earlier command of the run, whose measured memory is taken over.
    """
    with torch.no_grad():
        inputs = _input_kinds(unit_samples(denoiser, graph, probe[:2]), graph)
        batch = probe.cycled(min(config.reconstruction.batch_size, MOST_TIMED))
        started = time.perf_counter()
        batch.predict(denoiser)
        forward = (time.perf_counter() - started) / len(batch)  # of one sample
    device = next(denoiser.parameters()).device
    limits = resolve_limits(config.calibration.memory_budget, device, config.run_dir, config.trainer.devices)
    footprint = _measured_before(earlier) or measure_footprint(config, denoiser, others, graph, probe, calls)
    kinds = _Kinds(graph, inputs, probe.x[0])
    return _plan(config, coverage, kinds, calls, world_size(), limits, footprint, lambda n: forward * n / world_size())


def _measured_before(earlier: Mapping[str, Any] | None) -> Footprint | None:
    """The memory that an earlier command measured, if that was with as many processes."""
    try:
        check_shape(earlier, {"processes": NUMBER, "model_bytes": NUMBER, "workspace_bytes": Named(NUMBER)}, "plan")
    except ValueError:
        return None
    assert earlier is not None
    if earlier["processes"] != world_size():
        return None
    return Footprint(earlier["model_bytes"], dict(earlier["workspace_bytes"]))


def sketch_plan(
    config: Config, denoiser: nn.Module, graph: UnitGraph, coverage: list[CoverageRow], samples: Samples, calls: int
) -> Plan:
    """The plan of a model without weights, from shapes alone; its time is that of devices of an assumed throughput.

    Args:
        config: the run's configuration.
        denoiser: on the meta device.
        graph: units in execution order.
        coverage: the coverage table.
        samples: in the shapes of its inputs, at least `tracing.SIZES[1]`, on the meta device.
        calls: denoiser calls of one trajectory.
    """
    with torch.no_grad():
        inputs = _input_kinds(unit_samples(denoiser, graph, samples), graph)
    trial = TrialWork(config, denoiser, graph, samples)
    workspace = {"learn": trial.learning_bytes() if config.reconstruction.enabled else 0}
    ranks = config.trainer.devices * config.trainer.num_nodes
    flops = forward_flops(denoiser, samples[:1])
    limits: dict[Tier, float] = {"device": 0.0, "host": math.inf, "disk": 0.0}
    kinds = _Kinds(graph, inputs, samples.x[0])
    footprint = Footprint(trial.model_bytes(), workspace)

    def seconds(passes: float) -> float:
        return seconds_on_devices(passes, flops, ranks, DEVICE_TFLOPS, RANK_EFFICIENCY)

    return _plan(config, coverage, kinds, calls, ranks, limits, footprint, seconds)


@dataclass(frozen=True)
class _Kinds:
    """What is stored: the units' outputs, the inputs of each, and samples like this one, of the outputs' type."""

    graph: UnitGraph
    inputs: list[list[TensorKind]]
    sample: Tensor


def _plan(
    config: Config,
    coverage: list[CoverageRow],
    kinds: _Kinds,
    calls: int,
    ranks: int,
    limits: dict[Tier, float],
    footprint: Footprint,
    seconds: Callable[[float], float],
) -> Plan:
    calibration = config.calibration
    trajectories = calibration.num_trajectories, calibration.held_out_trajectories
    on_rank = sum(math.ceil(count / ranks) for count in trajectories) * calls
    steps = config.reconstruction.iterations if config.reconstruction.enabled else 0
    layers: dict[str, int] = {}
    for row in coverage:
        layers[row.bits] = layers.get(row.bits, 0) + 1
    stored = getattr(torch, calibration.storage)
    sets = len(calibration.indices) + config.num_rounds * calibration.mismatch_trajectories

    def peaks(tiers: dict[Tier, float]) -> dict[Tier, int]:
        return store_peaks(kinds.graph, kinds.inputs, on_rank, kinds.sample.dtype, stored, tiers)

    return Plan(
        processes=ranks,
        units=len(kinds.graph.names),
        samples=sum(trajectories) * calls,
        layers=layers,
        kept=[row.name for row in coverage if row.note == KEPT_BY_RULE or row.note.startswith(UNKNOWN_ATTENTION)],
        steps=steps * len(kinds.graph.names),
        store_bytes=_store_peaks(limits, peaks),
        limits=limits,
        model_bytes=footprint.models,
        workspace_bytes=footprint.workspace,
        seconds=seconds(calibration_passes(config, calls)),
        evaluation_seconds=seconds(evaluation_passes(config, calls)),
        trajectory_bytes=sets * calls * kinds.sample.nbytes,
        image_bytes=2 * config.evaluation.num_images * kinds.sample.numel() * torch.float32.itemsize,
    )


def _store_peaks(limits: dict[Tier, float], peaks: Callable[[dict[Tier, float]], dict[Tier, int]]) -> dict[Tier, int]:
    """Bytes of the store by tier; a budget that is too small is refused with the least that would do."""
    try:
        return peaks(limits)
    except UserError as error:
        least = math.ceil(peaks(limits | {"disk": math.inf})["disk"] / 1e3) / 1e6
        raise UserError(f"{error}, or raise calibration.memory_budget.disk to at least {least:.6f} GB") from error


def _input_kinds(units: dict[str, UnitData], graph: UnitGraph) -> list[list[TensorKind]]:
    """Shape without the batch axis, and type, of each unit's inputs."""
    return [[(tuple(x.shape[1:]), x.dtype) for x in units[name].inputs] for name in graph.names]


def coverage_table(rows: list[CoverageRow]) -> Table:
    """Every layer with parameters and every attention matmul, with its role and bits."""
    table = Table(title="coverage", title_justify="left")
    for heading in ("layer", "kind", "role", "bits", "note"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.name, row.kind, row.role, row.bits, row.note)
    return table
