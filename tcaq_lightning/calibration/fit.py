"""One Lightning fit of a unit, resumed from its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.bias_correction import ShiftedLayer
from tcaq_lightning.calibration.early_stop import EarlyStop, rounded_hard
from tcaq_lightning.calibration.reconstruction import BlockReconstruction, Phase
from tcaq_lightning.calibration.restore import warn_of_damage
from tcaq_lightning.calibration.run_files import RunFile
from tcaq_lightning.calibration.stage_clock import Spent, StageClock
from tcaq_lightning.calibration.state import Setup
from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.calibration.unit_errors import unit_errors, weighted_sum
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.errors import RankLostError, UserError
from tcaq_lightning.nn.state import check_quantization_state, quantization_state, restore_quantization_state
from tcaq_lightning.runtime.distributed.collectives import on_main, world_size
from tcaq_lightning.runtime.files import DamagedFileError, read_checkpoint
from tcaq_lightning.runtime.json_shape import NUMBER, TEXT, Kind, Named, check_shape
from tcaq_lightning.runtime.lightning import UnitCheckpoint, make_trainer
from tcaq_lightning.runtime.memory import is_out_of_memory
from tcaq_lightning.runtime.one_line import one_line

log = logging.getLogger(__name__)

CHECKPOINT = {
    "place": {},
    "spent": {"seconds": Named(NUMBER), "executions": Named(NUMBER)},
    "ranks": NUMBER,
    "global_step": NUMBER,
    "epoch": NUMBER,
    "pytorch-lightning_version": TEXT,
    "state_dict": Named(Kind("a tensor", (Tensor,))),
    "optimizer_states": [{"state": {}, "param_groups": [{}]}],
    "lr_schedulers": [{}],
    "loops": {"fit_loop": {}},
    "callbacks": {},
}
"""What a checkpoint must hold for a fit to go on from it."""


@dataclass(frozen=True)
class PreparedUnit:
    """A unit and the samples that it is calibrated on, on this rank.

    Attributes:
        unit: quantized unit, initialized.
        data: its samples, with the weights of their errors.
        train: indices of the samples to learn from.
        held_out: indices of the samples to judge by.
        shifted: layer whose bias shifts the unit's output; None without bias correction.
    """

    unit: nn.Module
    data: UnitData
    train: Tensor
    held_out: Tensor
    shifted: ShiftedLayer | None


def fit_unit(
    setup: Setup,
    visit: Visit,
    prepared: PreparedUnit,
    phase: Phase,
    iterations: int,
    clock: StageClock,
    callbacks: Sequence[pl.Callback] = (),
) -> float:
    """Fit a unit in one phase, resumed from its checkpoint if there is one.

    Args:
        setup: what the calibration works on.
        visit: which unit.
        prepared: the unit and its samples.
        phase: which phase.
        iterations: its optimisation steps.
        clock: counts what learning takes; a checkpoint keeps it, and a resumed fit goes on from there.
        callbacks: Lightning callbacks of the fit.

    Returns:
        The share of weights that were undecided at the end; 0 of an r phase.
    """
    config, unit = setup.config, prepared.unit
    file = setup.files.checkpoint(visit, phase)
    if phase == "r" and _resume_point(setup.files.checkpoint(visit, "v"), unit) is not None:
        return 0.0  # the V phase has begun, and its checkpoint holds what this phase learned
    spent = _resume_point(file, unit)
    if spent is not None:
        clock.go_on_from(spent)
    module = BlockReconstruction(
        unit,
        prepared.data,
        prepared.train,
        setup.timestep_groups,
        config.reconstruction,
        phase,
        iterations,
        (config.seed, visit.round_index, visit.position),
        prepared.shifted,
        config.phase_iterations().get((visit.round_index, "r"), 0) if phase == "v" else 0,
    )
    if not module.learns:
        module.finish()
        return 0.0
    own: list[pl.Callback] = [UnitCheckpoint(file.path, config.trainer.checkpoint_every, file.place, clock.learning)]
    if (patience := config.reconstruction.patience) is not None:
        stop = EarlyStop(
            lambda: held_out_error(setup, prepared), iterations, patience, config.reconstruction.held_out_checks
        )
        callbacks = [stop, *callbacks]  # first: a checkpoint holds what it has found
    trainer = make_trainer(
        config.trainer, [*callbacks, *own], None, iterations, config.logging.every_n_steps, setup.device
    )
    with deterministic(setup.device), _blaming(file, None if spent is None else module):
        trainer.fit(module, ckpt_path=None if spent is None else str(file.path), weights_only=True)
    undecided = module.undecided() if phase == "v" else 0.0
    module.finish()
    return undecided


@contextmanager
def _blaming(file: RunFile, module: BlockReconstruction | None) -> Iterator[None]:
    """Say that a checkpoint is to blame for what fails before the first step of a fit that goes on from it."""
    try:
        yield
    except Exception as error:  # Lightning and torch raise whatever the content makes them
        if module is None or module.started or isinstance(error, (UserError, RankLostError)) or is_out_of_memory(error):
            raise
        raise UserError(
            f"{file.path} is damaged: expected a checkpoint of this fit, got {one_line(error)}; remove it, and the "
            "same command begins the unit again"
        ) from error


def held_out_error(setup: Setup, prepared: PreparedUnit) -> float:
    """The unit's weighted error on held-out samples; during a fit, the error it would have if the fit ended now."""
    batch_size = setup.config.judged_batch_size
    with rounded_hard(prepared.unit):
        errors = unit_errors(
            prepared.unit, prepared.data, prepared.held_out, setup.timestep_groups, batch_size, setup.device
        )
    return weighted_sum(errors.squares, prepared.data.weights)


def _resume_point(file: RunFile, unit: nn.Module) -> Spent | None:
    """What was spent up to a checkpoint that a fit can resume from; the unit then gets the state in which it began.

    None if there is no such checkpoint.
    """
    found = on_main(lambda: checkpointed_state(file, unit))
    if found is None:
        return None
    state, spent = found
    restore_quantization_state(unit, state)
    return spent


def checkpointed_state(file: RunFile, unit: nn.Module) -> tuple[dict[str, Tensor], Spent] | None:
    """Read a unit's quantization state from a checkpoint; a checkpoint that no fit can resume from is removed.

    Args:
        file: the checkpoint.
        unit: quantized unit that the checkpoint must match.

    Returns:
        None if there is no checkpoint to resume from.
    """
    path = file.path
    if not path.exists():
        return None
    try:
        checkpoint = read_checkpoint(path)
        check_shape(checkpoint, CHECKPOINT, "it")
        if checkpoint["place"] != file.place:
            raise ValueError("written as the checkpoint of something else")
        state = {k.removeprefix("unit."): v for k, v in checkpoint["state_dict"].items()}
        if not all(torch.equal(p.cpu(), state[name]) for name, p in unit.named_parameters()):
            raise ValueError("of another full-precision model")  # whose weights a resumed fit would write into this one
        state = {k: state[k] for k in quantization_state(unit)}
        check_quantization_state(unit, state)
        if (ranks := checkpoint["ranks"]) == world_size():
            return state, checkpoint["spent"]
        log.warning("%s is of a run on %d processes, not on %d; the unit is begun again", path, ranks, world_size())
    except (DamagedFileError, KeyError, ValueError, TypeError, AttributeError) as error:
        warn_of_damage(path, error)
    path.unlink()
    return None


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels within a fit, where the device has them, so that a resumed fit is bit-identical."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(device.type == "cpu", warn_only=True)
    memory.fill_uninitialized_memory = False  # for debugging, at a pass over all memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn_only)
        memory.fill_uninitialized_memory = before[1]
