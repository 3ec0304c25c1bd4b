"""PAR's loop: rounds, and in each round the units in execution order (METHOD sections 5 and 6)."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.fit import warn_of_damage
from tcaq_lightning.calibration.run_dir import Run
from tcaq_lightning.calibration.shards import Shard
from tcaq_lightning.calibration.state import Calibration
from tcaq_lightning.calibration.storage import ActivationStorage
from tcaq_lightning.calibration.streams import Streams
from tcaq_lightning.calibration.unit import reconstruct_unit
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.config import Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.methods import par
from tcaq_lightning.methods.headroom import leave_headroom
from tcaq_lightning.methods.sensitivity import sampler_gain, unit_sensitivities
from tcaq_lightning.models.sampling import Sampling
from tcaq_lightning.models.trajectories import Trajectories, collect_together
from tcaq_lightning.nn.state import check_quantization_state, quantization_state, restore_quantization_state, settle
from tcaq_lightning.runtime.distributed.collectives import broadcast, on_main, total
from tcaq_lightning.runtime.files import DamagedFileError, load_tensors, naming, save_tensors
from tcaq_lightning.runtime.hashing import weights_hash
from tcaq_lightning.runtime.memory import freed_memory_reused, release_freed_memory

log = logging.getLogger(__name__)


def run_rounds(work: Calibration) -> list[dict[str, Any]] | None:
    """Run all rounds, or what is left of them.

    Returns:
        One record for each round: mismatch by step on held-out noise, whether the round was kept, seconds. None if
        `trainer.stop_after` ended it.

    Raises:
        UserError: the full-precision model's own trajectories diverged.
    """
    if not all(x.isfinite().all() for x in (work.trajectories.inputs, work.trajectories.finals)):
        raise UserError(
            "calibration.sampler: the full-precision model's own trajectories are NaN or infinite; expected a sampler "
            "that the model works with"
        )
    gc.freeze()  # what is there now stays: the collections between units look at the units' leftovers alone
    with naming(work.run.directory), freed_memory_reused(False):
        return _run_rounds(work)


def _run_rounds(work: Calibration) -> list[dict[str, Any]] | None:
    leave_headroom(work.quantized, work.graph, work.config.headroom, work.config.quantization.activation.bits)
    _weigh_errors(work)
    rounds: list[dict[str, Any]] = []
    best: tuple[float, int, Trajectories] | None = None
    calibration = work.config.calibration
    samples = work.trajectories.select(slice(calibration.num_trajectories + calibration.held_out_trajectories))
    for round_index in range(work.config.num_rounds):
        if best is not None:
            samples = _aligned_samples(work, round_index, best[2])
        if not _run_round(work, round_index, samples, None if best is None else best[1]):
            return None
        record, sampled = _measure_round(work, round_index)
        if best is None or par.helped(record["mean_mismatch"], best[0]):
            best = record["mean_mismatch"], round_index, sampled
        else:
            record["kept"] = False
            for position in range(len(work.graph.names)):
                _reopen(work, best[1], position)
                settle(work.quantized.get_submodule(work.graph.names[position]))
            log.info("round %d raised the held-out mismatch: the state before it is kept", round_index)
        rounds.append(record)
        for listener in work.listeners:
            listener.on_round_end(round_index, record, sampled)
    return rounds


def _weigh_errors(work: Calibration) -> None:
    """Measure what the units' errors do to the samples, once in a run."""
    if not work.config.reconstruction.enabled or work.config.reconstruction.weighting == "uniform":
        return
    path = work.run.directory / "calibration" / "sensitivities.safetensors"
    found = on_main(lambda: _stored(path))
    if found is not None:
        work.sensitivities = found[0]
        return
    gain = sampler_gain(work.sampling.scheduler, work.trajectories.timesteps, work.config.sensitivity.data_variance)
    work.sensitivities = unit_sensitivities(
        work.full,
        work.graph,
        work.context,
        work.trajectories,
        gain,
        work.batch_size,
        work.config.seed,
        work.config.sensitivity.probes,
    )
    on_main(lambda: save_tensors(path, work.sensitivities))
    release_freed_memory()  # the pass through the whole denoiser leaves holes that nothing later fills


def _aligned_samples(work: Calibration, round_index: int, held_out: Trajectories) -> Trajectories:
    """A later round's samples: a share of the trajectories by the quantized sampler as it now is, from the same noise.

    Args:
        work: the calibration.
        round_index: m.
        held_out: the quantized sampler's held-out trajectories.
    """
    drawn = par.draw(work.config, round_index)
    redrawn = None
    if len(drawn.replaced):
        path = work.run.round_dir(round_index) / "trajectories.safetensors"
        redrawn = _quantized_trajectories(work, path, drawn.replaced.tolist())
    judges = slice(work.config.calibration.held_out_trajectories)
    return par.aligned_samples(drawn, work.trajectories, redrawn, work.held_out.select(judges), held_out.select(judges))


def _quantized_trajectories(work: Calibration, path: Path, indices: Sequence[int]) -> Trajectories:
    """The quantized sampler's trajectories, kept on disk."""
    return stored_trajectories(path, work.config, work.quantized, work.sampling, indices)


def calibration_trajectories(
    config: Config, run: Run, full: nn.Module, sampling: Sampling, advance: Callable[[int], None] | None = None
) -> Trajectories:
    """The trajectories that calibration starts from, of the full-precision sampler; kept on disk.

    Args:
        config, run: the run.
        full: full-precision denoiser.
        sampling: how the pipeline is sampled.
        advance: told the number of trajectories just done.
    """
    path = run.directory / "calibration" / "trajectories.safetensors"
    return stored_trajectories(path, config, full, sampling, config.calibration.indices, advance)


def stored_trajectories(
    path: Path,
    config: Config,
    denoiser: nn.Module,
    sampling: Sampling,
    indices: Sequence[int],
    advance: Callable[[int], None] | None = None,
) -> Trajectories:
    """Trajectories from a file of the run, made and written if it is missing or damaged; the same on every rank.

    The file carries a manifest: hash of the model, sampler and its settings, seed, guidance, labels or prompts.

    Args:
        path: of the file.
        config: the run's configuration.
        denoiser: that samples, full-precision or quantized.
        sampling: how the pipeline is sampled.
        indices: numbers of the noises.
        advance: told the number of trajectories just done.
    """
    found = on_main(lambda: _stored(path))
    if found is not None:
        return Trajectories.unpacked(*found)
    data, seed = config.calibration, config.seed
    trajectories = collect_together(denoiser, sampling, data.sampler, indices, seed, data.batch_size, advance)

    def write() -> None:
        tensors, record = trajectories.packed()
        manifest = {
            "denoiser": weights_hash(denoiser),
            "sampler": {"own": type(sampling.scheduler).__name__, **dataclasses.asdict(data.sampler)},
            "seed": seed,
            "noises": list(indices),
            **sampling.manifest(),
        }
        save_tensors(path, tensors, {**record, "manifest": manifest})

    on_main(write)
    return trajectories


def _stored(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    if not path.exists():
        return None
    try:
        return load_tensors(path)
    except DamagedFileError as error:
        log.warning("%s; made again", error)
        return None


def _measure_round(work: Calibration, round_index: int) -> tuple[dict[str, Any], Trajectories]:
    """Mismatch of the quantized sampler on held-out noise (METHOD section 5)."""
    started = time.perf_counter()
    path = work.run.round_dir(round_index) / "held_out.safetensors"
    indices = work.config.calibration.indices[work.config.calibration.num_trajectories :]
    sampled = _quantized_trajectories(work, path, indices)
    distances = par.mismatch(sampled, work.held_out)
    record = {
        "round": round_index,
        "timesteps": work.trajectories.timesteps[:: work.trajectories.halves].tolist(),
        "mismatch": distances.tolist(),
        "mean_mismatch": float(distances.mean()),
        "kept": True,
        "seconds": time.perf_counter() - started,
    }
    return broadcast(record), sampled


def _run_round(work: Calibration, round_index: int, samples: Trajectories, start: int | None) -> bool:
    """Bring all units into their final state of a round.

    Args:
        work: the calibration.
        round_index: of the round. samples: that it learns from and judges by.
        start: the round whose result it starts from; None in the first one.

    Returns:
        Whether the run goes on.
    """
    names = work.graph.names
    restored = [_restored(work, round_index, position) for position in range(len(names))]
    held_out = work.config.calibration.held_out_trajectories
    groups = work.context.of(samples.timesteps)
    shard = Shard.deal(groups, samples.num_trajectories - held_out, held_out)
    streams = None
    if None in restored:  # a finished round needs no streams
        stored = getattr(torch, work.config.calibration.storage)
        storage = ActivationStorage(work.limits, work.device, work.run.directory, stored)
        own = samples.select(shard.trajectories).flat()
        streams = Streams(work.full, work.quantized, work.graph, work.context, own, work.batch_size, storage)
    for position, (name, record) in enumerate(zip(names, restored, strict=True)):
        visit = Visit(round_index, position, name, start)
        for listener in work.listeners:
            listener.on_unit_start(visit)
        if streams is not None:
            record = _advance(work, round_index, position, streams, shard, record, start)
        assert record is not None
        work.records.append(record)
        for listener in work.listeners:
            listener.on_unit_end(visit, record)
        if name == work.config.trainer.stop_after:
            return False
    return True


def _advance(
    work: Calibration,
    round_index: int,
    position: int,
    streams: Streams,
    shard: Shard,
    record: dict[str, Any] | None,
    start: int | None,
) -> dict[str, Any]:
    """Propagate both streams through a unit, which is reconstructed first if it has no record yet."""
    started = time.perf_counter()
    with freed_memory_reused(True):
        data = streams.load(position)
    loaded = time.perf_counter() - started
    if record is None:
        if start is not None:
            _reopen(work, start, position)
        record = reconstruct_unit(work, round_index, position, data, shard)
        record["seconds"]["streams"] = loaded
        executions = record["executions"] | streams.executions(position)
        counts = total(torch.tensor(list(executions.values())))
        record["executions"] = dict(zip(executions, counts.tolist(), strict=True))
        record = _settle(work, round_index, position, record)
    started = time.perf_counter()
    with freed_memory_reused(True):
        streams.store(position, data)
    record["seconds"]["store"] = time.perf_counter() - started
    del data
    gc.collect()
    return record


def _settle(work: Calibration, round_index: int, position: int, record: dict[str, Any]) -> dict[str, Any]:
    """Write a unit's state and record, those of rank 0, which every rank has afterwards."""
    name = work.graph.names[position]
    unit = work.quantized.get_submodule(name)
    state, record = broadcast((quantization_state(unit), record))
    restore_quantization_state(unit, state)

    def write() -> None:
        save_tensors(work.run.unit_file(round_index, position, name), state, record)
        for phase in ("r", "v"):
            work.run.checkpoint(round_index, position, phase).unlink(missing_ok=True)

    on_main(write)
    settle(unit)
    return record


def _reopen(work: Calibration, round_index: int, position: int) -> None:
    """Give a unit the state in which a round left it, with its rounding logits, which are kept on disk alone.

    Raises:
        UserError: the unit's file is damaged.
    """
    if _put_back(work, round_index, position) is None:
        path = work.run.unit_file(round_index, position, work.graph.names[position])
        raise UserError(f"{path} was damaged while the run went on; the same command does the unit again")


def _restored(work: Calibration, round_index: int, position: int) -> dict[str, Any] | None:
    """Put a finished unit's state back, settled; None if it is not finished or its file is damaged."""
    record = _put_back(work, round_index, position)
    if record is not None:
        settle(work.quantized.get_submodule(work.graph.names[position]))
    return record


def _put_back(work: Calibration, round_index: int, position: int) -> dict[str, Any] | None:
    """Put a unit's state back as its file has it, and return its record; None without a file, or of a damaged one."""
    name = work.graph.names[position]
    unit = work.quantized.get_submodule(name)
    found = on_main(lambda: _stored_unit(work.run.unit_file(round_index, position, name), unit))
    if found is None:
        return None
    state, record = found
    restore_quantization_state(unit, state)
    return record


def _stored_unit(path: Path, unit: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    if not path.exists():
        return None
    try:
        state, record = load_tensors(path)
        check_quantization_state(unit, state)
    except (DamagedFileError, KeyError) as error:
        warn_of_damage(path, error)
        return None
    return state, dict(record)
