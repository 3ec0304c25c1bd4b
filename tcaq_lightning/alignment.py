"""PAR's loop: rounds, and in each round the units in execution order (METHOD sections 5 and 6)."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from tcaq_lightning.activations import Streams, UnitData
from tcaq_lightning.config import Config
from tcaq_lightning.files import CheckedCheckpointIO, DamagedFileError, load_tensors, save_tensors
from tcaq_lightning.initialization import Choices, Observations, initialize
from tcaq_lightning.observation import UnitObservation
from tcaq_lightning.quantize import (
    full_precision,
    quant_layers,
    quantization_state,
    restore_quantization_state,
)
from tcaq_lightning.reconstruction import BlockReconstruction, Phase, mean_errors, unit_error
from tcaq_lightning.run import Run
from tcaq_lightning.timesteps import TimestepGroups
from tcaq_lightning.trainers import UnitCheckpoint, make_trainer
from tcaq_lightning.trajectories import Trajectories, collect, mismatch, mixed
from tcaq_lightning.units import UnitGraph, output_layer

log = logging.getLogger(__name__)

REFINE_LOGIT = 0.5
"""Logits of a later round start within [-0.5, 0.5], so that a rounding can still flip."""


class Listener(Protocol):
    """What the loop tells the outside; callbacks implement it."""

    def unit_started(self, round_index: int, position: int, name: str) -> None: ...
    def unit_finished(self, round_index: int, position: int, record: dict[str, Any]) -> None: ...
    def unit_initialized(self, tag: str, unit: nn.Module, observed: Observations, choices: Choices) -> None: ...
    def round_finished(self, round_index: int, record: dict[str, Any], samples: Trajectories) -> None: ...


@dataclass
class Calibration:
    """Everything the loop works on.

    Attributes:
        full, quantized: denoisers, the second with quantized layers.
        scheduler: the pipeline's own scheduler.
        graph: units in execution order.
        context: timestep groups of the quantized denoiser.
        trajectories: full-precision trajectories; the last `held_out_trajectories` of them are held out.
        observers: Lightning callbacks of observation passes. learners: of fits.
        listener: told what happens.
        logger: shared TensorBoard logger, or None.
    """

    config: Config
    run: Run
    full: nn.Module
    quantized: nn.Module
    scheduler: Any
    graph: UnitGraph
    context: TimestepGroups
    trajectories: Trajectories
    listener: Listener
    observers: Sequence[pl.Callback] = ()
    learners: Sequence[pl.Callback] = ()
    logger: Logger | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return next(self.full.parameters()).device

    @property
    def batch_size(self) -> int:
        return self.config.calibration.batch_size

    def split(self) -> tuple[Tensor, Tensor]:
        """Numbers of the samples to learn from and of the held-out ones, among all S * N samples."""
        steps, count = self.trajectories.num_steps, self.trajectories.num_trajectories
        grid = torch.arange(steps * count).view(steps, count)
        learned = self.config.calibration.num_trajectories
        return grid[:, :learned].flatten(), grid[:, learned:].flatten()


def calibrate(work: Calibration) -> list[dict[str, Any]]:
    """Run all rounds, or what is left of them.

    Returns:
        One record for each round: mismatch by step on held-out noise, whether the round was kept, seconds.
    """
    rounds: list[dict[str, Any]] = []
    best: tuple[float, dict[str, Tensor]] | None = None
    samples = work.trajectories
    for round_index in range(work.config.num_rounds):
        if round_index:
            share = round_index / work.config.par.rounds
            samples = _aligned_samples(work, share, round_index)
        _run_round(work, round_index, samples)
        record, sampled = _measure_round(work, round_index)
        if best is None or record["mean_mismatch"] < best[0]:
            best = record["mean_mismatch"], quantization_state(work.quantized)
        else:
            record["kept"] = False
            restore_quantization_state(work.quantized, best[1])
            log.info("round %d raised the held-out mismatch: the state before it is kept", round_index)
        rounds.append(record)
        work.listener.round_finished(round_index, record, sampled)
    return rounds


def _aligned_samples(work: Calibration, share: float, round_index: int) -> Trajectories:
    """A round's samples: a share of the trajectories by the quantized sampler as it now is, from the same noise."""
    quantized = _quantized_trajectories(work, round_index, held_out_only=False)
    learned = work.config.calibration.num_trajectories
    seed = work.config.seed * 1009 + round_index
    parts = [
        mixed(work.trajectories.select(part), quantized.select(part), share, seed)
        for part in (slice(0, learned), slice(learned, None))
    ]
    return Trajectories.join(parts)


def _quantized_trajectories(work: Calibration, round_index: int, held_out_only: bool) -> Trajectories:
    """The quantized sampler's trajectories at the start of a round (or held-out ones at its end), kept on disk."""
    calibration = work.config.calibration
    total = calibration.num_trajectories + calibration.held_out_trajectories
    indices = range(calibration.num_trajectories if held_out_only else 0, total)
    path = work.run.round_dir(round_index) / ("held_out.safetensors" if held_out_only else "trajectories.safetensors")
    return stored_trajectories(
        path,
        lambda: collect(
            work.quantized, work.scheduler, calibration.sampler, indices, work.config.seed, work.batch_size
        ),
    )


def stored_trajectories(path: Path, make: Any) -> Trajectories:
    """Trajectories from a file of the run, made and written if it is missing or damaged."""
    if path.exists():
        try:
            return Trajectories(**load_tensors(path)[0])
        except DamagedFileError as error:
            log.warning("%s; made again", error)
    trajectories: Trajectories = make()
    save_tensors(path, trajectories.tensors())
    return trajectories


def _measure_round(work: Calibration, round_index: int) -> tuple[dict[str, Any], Trajectories]:
    """Mismatch of the quantized sampler on held-out noise (METHOD section 5)."""
    started = time.perf_counter()
    sampled = _quantized_trajectories(work, round_index, held_out_only=True)
    learned = work.config.calibration.num_trajectories
    distances = mismatch(sampled, work.trajectories.select(slice(learned, None)))
    record = {
        "round": round_index,
        "timesteps": work.trajectories.timesteps.tolist(),
        "mismatch": distances.tolist(),
        "mean_mismatch": float(distances.mean()),
        "kept": True,
        "seconds": time.perf_counter() - started,
    }
    return record, sampled


def _run_round(work: Calibration, round_index: int, samples: Trajectories) -> None:
    x, timesteps = samples.flat()
    streams = Streams(work.full, work.quantized, work.graph, work.context, x, timesteps, work.batch_size)
    for position, name in enumerate(work.graph.names):
        work.listener.unit_started(round_index, position, name)
        record = _restored(work, round_index, position)
        started = time.perf_counter()
        data = streams.load(position)
        loaded = time.perf_counter() - started
        if record is None:
            record = _reconstruct(work, round_index, position, data)
            record["seconds"]["streams"] = loaded
            unit = work.quantized.get_submodule(name)
            save_tensors(work.run.unit_file(round_index, position, name), quantization_state(unit), record)
            for phase in ("r", "v"):
                work.run.checkpoint(round_index, position, phase).unlink(missing_ok=True)
        streams.store(position, data)
        del data
        gc.collect()
        work.records.append(record)
        work.listener.unit_finished(round_index, position, record)


def _restored(work: Calibration, round_index: int, position: int) -> dict[str, Any] | None:
    """Put a finished unit's state back; None if it is not finished or its file is damaged."""
    name = work.graph.names[position]
    path = work.run.unit_file(round_index, position, name)
    if not path.exists():
        return None
    try:
        state, record = load_tensors(path)
        restore_quantization_state(work.quantized.get_submodule(name), state)
    except (DamagedFileError, KeyError) as error:
        log.warning("%s: %s; the unit is done again", path, error)
        return None
    return dict(record)


def _reconstruct(work: Calibration, round_index: int, position: int, data: UnitData) -> dict[str, Any]:
    """Observe, set, learn, gate; leaves the unit in its final state of this round and returns the record."""
    config, name = work.config, work.graph.names[position]
    unit = work.quantized.get_submodule(name)
    tag = f"round{round_index}/{position:02d}-{name}"
    train, held_out = work.split()
    clock = _Clock()
    record: dict[str, Any] = {"round": round_index, "position": position, "unit": name, "kept": True}

    if round_index == 0:
        with clock("observe"):
            observed = _observe(work, unit, data, train)
        with clock("search"):
            choices = initialize(
                unit, data, work.context, observed, config.tcr, config.daq, work.device
            )
        work.listener.unit_initialized(tag, unit, observed, choices)
        record["attention"] = {n: choice.to_dict() for n, choice in choices.attention.items()}
        record["tcr_output_error"] = choices.reparameterization
    incoming = quantization_state(unit)
    roundings = _roundings(unit)

    def held_out_error() -> float:
        with clock("gate"):
            return unit_error(unit, data, held_out, work.context, work.batch_size, work.device)

    record["before"] = record["after"] = held_out_error()
    if config.reconstruction.enabled:
        if round_index:
            _soften(unit)
        undecided = 0.0
        for (phase_round, phase), iterations in config.phase_iterations().items():
            if phase_round == round_index:
                with clock(f"learn_{phase}"):
                    undecided = _fit(work, unit, data, train, phase, iterations, round_index, position)  # type: ignore[arg-type]
        if config.reconstruction.bias_correction:
            with clock("gate"):
                _correct_bias(work, unit, name, data, train)
        record["after"] = record["learned"] = held_out_error()
        record["undecided"] = undecided
        if config.reconstruction.gate and not record["learned"] <= record["before"]:
            restore_quantization_state(unit, incoming)
            record |= {"kept": False, "after": record["before"]}
            log.info("%s: learned error %.4g > %.4g: the state before is kept", tag, record["learned"], record["before"])
    record["flipped"] = float((_roundings(unit) != roundings).float().mean()) if len(roundings) else 0.0
    record["seconds"] = clock.seconds
    return record


def _observe(work: Calibration, unit: nn.Module, data: UnitData, train: Tensor) -> Observations:
    module = UnitObservation(unit, data, train, work.context, work.batch_size)
    with full_precision(unit):
        make_trainer(work.config.trainer, work.observers, work.logger).predict(module, return_predictions=False)
    return module.observed


def _fit(
    work: Calibration,
    unit: nn.Module,
    data: UnitData,
    train: Tensor,
    phase: Phase,
    iterations: int,
    round_index: int,
    position: int,
) -> float:
    """One Lightning fit, resumed from its checkpoint if there is one; returns the undecided share."""
    config = work.config
    path = work.run.checkpoint(round_index, position, phase)
    if phase == "r" and work.run.checkpoint(round_index, position, "v").exists():
        return 0.0  # the V phase has begun, and its checkpoint holds what this phase learned
    resumed = _resume_point(path, unit)
    before = config.phase_iterations().get((round_index, "r"), 0) if phase == "v" else 0
    module = BlockReconstruction(
        unit,
        data,
        train,
        work.context,
        config.reconstruction,
        phase,
        iterations,
        (config.seed, round_index, position),
        before,
    )
    callbacks = [*work.learners, UnitCheckpoint(path, config.trainer.checkpoint_every)]
    trainer = make_trainer(config.trainer, callbacks, work.logger, iterations, config.logging.every_n_steps)
    with deterministic(work.device):
        trainer.fit(module, ckpt_path=str(path) if resumed else None, weights_only=True)
    undecided = module.undecided() if phase == "v" else 0.0
    module.finish()
    return undecided


def _resume_point(path: Path, unit: nn.Module) -> bool:
    """Whether a fit can go on from `path`; if so the unit gets the state in which that fit began."""
    if not path.exists():
        return False
    try:
        checkpoint = CheckedCheckpointIO().load_checkpoint(path)
        expected = quantization_state(unit)
        state = {k.removeprefix("unit."): v for k, v in checkpoint["state_dict"].items()}
        restore_quantization_state(unit, {k: state[k] for k in expected})
    except (DamagedFileError, KeyError) as error:
        log.warning("%s; the unit is done again", error)
        path.unlink()
        return False
    return True


@torch.no_grad()
def _soften(unit: nn.Module) -> None:
    """Let roundings flip again in a later round."""
    for layer in quant_layers(unit).values():
        layer.learned_weight.v.clamp_(-REFINE_LOGIT, REFINE_LOGIT)


@torch.no_grad()
def _roundings(unit: nn.Module) -> Tensor:
    """Hard rounding, up or down, of all weights of a unit."""
    parts = [(layer.learned_weight.v >= 0).flatten() for layer in quant_layers(unit).values()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


@torch.no_grad()
def _correct_bias(work: Calibration, unit: nn.Module, name: str, data: UnitData, train: Tensor) -> None:
    """Shift the unit's output channels by their mean error, for each timestep group (bias correction, Nagel et al.
    2019, section 4.2, by group)."""
    shifted = output_layer(unit, name)
    if shifted is None:
        return
    layer = quant_layers(work.quantized).get(shifted[0])
    if layer is None or layer.bias_shift is None:
        return
    channel_dim = 1 if data.targets.ndim == 4 else -1
    errors = mean_errors(unit, data, train, work.context, channel_dim, work.batch_size, work.device)
    layer.bias_shift += errors.to(layer.bias_shift) * shifted[1]


def seconds_by_stage(records: list[dict[str, Any]], rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of a whole calibration by stage, over all commands that took part in it."""
    total: dict[str, float] = {}
    for record in records:
        for stage, seconds in record["seconds"].items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total | {"mismatch": sum(r["seconds"] for r in rounds)}


@contextmanager
def deterministic(device: torch.device) -> Any:
    """Deterministic kernels within a fit, where the device has them, so that a resumed fit is bit-identical."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device.type == "cpu", warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Any:
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
