"""The loop: rounds, and in each round the units in execution order (docs/method.md, "PAR" and "Units and order")."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor

from tcaq_lightning.calibration.callback import listeners
from tcaq_lightning.calibration.restore import finish_unit, reopen, restored
from tcaq_lightning.calibration.shards import Shard
from tcaq_lightning.calibration.state import Calibrated, Record, Setup
from tcaq_lightning.calibration.storage import ActivationStorage
from tcaq_lightning.calibration.stored import stored_sensitivities, stored_trajectories
from tcaq_lightning.calibration.streams import Streams
from tcaq_lightning.calibration.unit import reconstruct_unit
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.errors import UserError
from tcaq_lightning.methods import par
from tcaq_lightning.methods.headroom import leave_headroom
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.nn.state import settle
from tcaq_lightning.runtime.distributed.collectives import broadcast, total
from tcaq_lightning.runtime.files import naming
from tcaq_lightning.runtime.memory import freed_memory_reused, out_of_memory_in

log = logging.getLogger(__name__)

Callbacks = Sequence[pl.Callback]


def run_rounds(setup: Setup, trajectories: Trajectories, callbacks: Callbacks = ()) -> Calibrated | None:
    """Run all rounds, or what is left of them.

    Args:
        setup: what the calibration works on; its quantized denoiser is set and learned.
        trajectories: of the full-precision sampler; those after the first `calibration.num_trajectories` are held out.
        callbacks: Lightning callbacks for observations and fits; a `CalibrationCallback` hears of units and rounds
            too.

    Returns:
        What was done; None if `trainer.stop_after` ended it.

    Raises:
        UserError: the full-precision model's own trajectories diverged.
    """
    if not all(x.isfinite().all() for x in (trajectories.inputs, trajectories.finals)):
        raise UserError(
            "calibration.sampler: the full-precision model's own trajectories are NaN or infinite; expected a sampler "
            "that the model works with"
        )
    config = setup.config
    with naming(setup.files.directory), freed_memory_reused(False), few_collected():
        leave_headroom(setup.quantized, setup.graph, config.headroom, config.quantization.activation.bits)
        sensitivities = stored_sensitivities(setup, trajectories)
        return _all_rounds(setup, trajectories, sensitivities, callbacks)


@contextmanager
def few_collected() -> Iterator[None]:
    """Let the garbage collections between units look only at what units leave behind, not at older objects."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _all_rounds(
    setup: Setup, trajectories: Trajectories, sensitivities: dict[str, Tensor], callbacks: Callbacks
) -> Calibrated | None:
    calibration = setup.config.calibration
    held_out = trajectories.select(slice(calibration.num_trajectories, None))
    samples = trajectories.select(slice(calibration.num_trajectories + calibration.held_out_trajectories))
    units: list[Record] = []
    rounds: list[Record] = []
    best: tuple[float, int, Trajectories] | None = None  # mean mismatch, its round, its held-out trajectories
    for round_index in range(setup.config.num_rounds):
        start = None
        if best is not None:
            _, start, sampled = best
            samples = _aligned_samples(setup, round_index, trajectories, sampled)
        records = _run_round(setup, setup.visits(round_index, start), samples, sensitivities, callbacks)
        units += records
        if records[-1]["unit"] == setup.config.trainer.stop_after:
            return None
        record, sampled = _measure_round(setup, round_index, held_out)
        if best is None or par.helped(record["mean_mismatch"], best[0]):
            best = record["mean_mismatch"], round_index, sampled
        else:
            record["kept"] = False
            for visit in setup.visits(best[1]):
                reopen(setup.unit(visit), visit, setup.files)
                settle(setup.unit(visit))
            log.info("round %d raised the held-out mismatch: the state before it is kept", round_index)
        rounds.append(record)
        for listener in listeners(callbacks):
            listener.on_round_end(round_index, record, sampled)
    return Calibrated(units, rounds)


def _aligned_samples(setup: Setup, round_index: int, trajectories: Trajectories, sampled: Trajectories) -> Trajectories:
    """A later round's samples: the quantized sampler in its present state draws a share of them, from the same noise.

    Args:
        setup: what the calibration works on.
        round_index: m.
        trajectories: of the full-precision sampler, held-out ones last.
        sampled: the quantized sampler's held-out trajectories.
    """
    config, redrawn = setup.config, None
    drawn = par.draw(config, round_index)
    if len(drawn.replaced):
        path = setup.files.aligned_trajectories(round_index)
        redrawn = stored_trajectories(path, config, setup.quantized, setup.sampling, drawn.replaced.tolist())
    held_out = trajectories.select(slice(config.calibration.num_trajectories, None))
    judges = slice(config.calibration.held_out_trajectories)
    return par.aligned_samples(drawn, trajectories, redrawn, held_out.select(judges), sampled.select(judges))


def _measure_round(setup: Setup, round_index: int, held_out: Trajectories) -> tuple[Record, Trajectories]:
    """Measure the mismatch of the quantized sampler on held-out noise; its trajectories are returned too."""
    started = time.perf_counter()
    path, calibration = setup.files.held_out(round_index), setup.config.calibration
    indices = calibration.indices[calibration.num_trajectories :]
    sampled = stored_trajectories(path, setup.config, setup.quantized, setup.sampling, indices)
    distances = par.mismatch(sampled, held_out)
    record = {
        "round": round_index,
        "timesteps": held_out.timesteps[:: held_out.halves].tolist(),
        "mismatch": distances.tolist(),
        "mean_mismatch": float(distances.mean()),
        "kept": True,
        "iterations": setup.config.steps_by_round()[round_index],
        "seconds": time.perf_counter() - started,
    }
    return broadcast(record), sampled


def _run_round(
    setup: Setup,
    visits: list[Visit],
    samples: Trajectories,
    sensitivities: dict[str, Tensor],
    callbacks: Callbacks,
) -> list[Record]:
    """Bring all units into their final state of a round, or those up to `trainer.stop_after`.

    Args:
        setup: what the calibration works on.
        visits: of the units, in execution order.
        samples: that the round learns from, and then those that it judges by.
        sensitivities: by unit, weights of its squared output error.
        callbacks: Lightning callbacks of observations and fits.

    Returns:
        A record for each unit.
    """
    found = [restored(setup.unit(visit), visit, setup.files) for visit in visits]
    held_out = setup.config.calibration.held_out_trajectories
    groups = setup.timestep_groups.of(samples.timesteps)
    shard = Shard.deal(groups, samples.num_trajectories - held_out, held_out)
    streams = None
    if None in found:  # a finished round needs no streams
        streams = _open_streams(setup, samples.select(shard.trajectories))
    records: list[Record] = []
    for visit, record in zip(visits, found, strict=True):
        for listener in listeners(callbacks):
            listener.on_unit_start(visit)
        if streams is not None:
            with out_of_memory_in(f"unit {visit.name}"):
                record = _advance(setup, visit, streams, shard, record, sensitivities.get(visit.name), callbacks)
        assert record is not None
        records.append(record)
        for listener in listeners(callbacks):
            listener.on_unit_end(visit, record)
        if visit.name == setup.config.trainer.stop_after:
            break
    return records


def _open_streams(setup: Setup, samples: Trajectories) -> Streams:
    """Streams over this rank's samples."""
    calibration = setup.config.calibration
    stored = getattr(torch, calibration.storage)
    storage = ActivationStorage(setup.limits, setup.device, setup.files.directory, stored)
    return Streams(
        setup.full,
        setup.quantized,
        setup.graph,
        setup.timestep_groups,
        samples.flat(),
        calibration.batch_size,
        storage,
    )


def _advance(
    setup: Setup,
    visit: Visit,
    streams: Streams,
    shard: Shard,
    record: Record | None,
    sensitivity: Tensor | None,
    callbacks: Callbacks,
) -> Record:
    """Propagate both streams through a unit, which is reconstructed first if it has no record yet."""
    started = time.perf_counter()
    with freed_memory_reused(True):
        data = streams.load(visit.position)
    loaded = time.perf_counter() - started
    unit = setup.unit(visit)
    if record is None:
        if visit.start is not None:
            reopen(unit, Visit(visit.start, visit.position, visit.name), setup.files)
        record = reconstruct_unit(setup, visit, data, shard, sensitivity, callbacks)
        record["seconds"]["streams"] = loaded
        executions = record["executions"] | streams.executions(visit.position)
        counts = total(torch.tensor(list(executions.values())))
        record["executions"] = dict(zip(executions, counts.tolist(), strict=True))
        record = finish_unit(unit, visit, record, setup.files)
    started = time.perf_counter()
    with freed_memory_reused(True):
        streams.store(visit.position, data)
    record["seconds"]["store"] = time.perf_counter() - started
    del data
    gc.collect()
    return record
