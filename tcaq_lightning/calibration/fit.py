"""One Lightning fit of a unit, resumed from its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.early_stop import EarlyStop, rounded_hard
from tcaq_lightning.calibration.reconstruction import BlockReconstruction, Phase, squared_errors
from tcaq_lightning.calibration.state import Calibration
from tcaq_lightning.calibration.streams import UnitData
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.output_layers import output_layer
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.nn.state import check_quantization_state, quantization_state, restore_quantization_state
from tcaq_lightning.runtime.distributed.collectives import on_main, world_size
from tcaq_lightning.runtime.files import DamagedFileError, read_checkpoint
from tcaq_lightning.runtime.lightning import UnitCheckpoint, make_trainer

log = logging.getLogger(__name__)


def fit_unit(
    work: Calibration,
    unit: nn.Module,
    data: UnitData,
    train: Tensor,
    held_out: Tensor,
    phase: Phase,
    iterations: int,
    round_index: int,
    position: int,
) -> float:
    """One Lightning fit, resumed from its checkpoint if there is one.

    Args:
        work: the calibration.
        unit: quantized unit. data: this rank's samples of it.
        train, held_out: numbers of the samples to learn from, and of those to judge by.
        phase, iterations: which phase, and its optimisation steps.
        round_index, position: which unit.

    Returns:
        The share of weights that were undecided at the end; 0 of an r phase.
    """
    config = work.config
    path = work.run.checkpoint(round_index, position, phase)
    if phase == "r" and _resume_point(work.run.checkpoint(round_index, position, "v"), unit):
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
        shifted_layer(work, unit, work.graph.names[position]),
        before,
    )
    callbacks = [*work.callbacks, UnitCheckpoint(path, config.trainer.checkpoint_every)]
    if (patience := config.reconstruction.patience) is not None:
        error = partial(held_out_error, work, unit, data, held_out)
        callbacks.insert(0, EarlyStop(error, iterations, patience))  # first: a checkpoint holds what it has found
    trainer = make_trainer(config.trainer, callbacks, None, iterations, config.logging.every_n_steps, work.device)
    with deterministic(work.device):
        trainer.fit(module, ckpt_path=str(path) if resumed else None, weights_only=True)
    undecided = module.undecided() if phase == "v" else 0.0
    module.finish()
    return undecided


def held_out_error(work: Calibration, unit: nn.Module, data: UnitData, held_out: Tensor) -> float:
    """The unit's weighted error on held-out samples; while it learns, what it would be if the fit ended now."""
    with rounded_hard(unit):
        squares = squared_errors(unit, data, held_out, work.context, work.config.judged_batch_size, work.device)
    return float((squares if data.weights is None else squares * data.weights).sum())


def _resume_point(path: Path, unit: nn.Module) -> bool:
    """Whether a fit can go on from `path`; if so the unit gets the state in which that fit began."""
    state = on_main(lambda: _checkpointed_state(path, unit))
    if state is None:
        return False
    restore_quantization_state(unit, state)
    return True


def _checkpointed_state(path: Path, unit: nn.Module) -> dict[str, Tensor] | None:
    """The unit's state in a checkpoint; None without a checkpoint to go on from, and then there is none any more."""
    if not path.exists():
        return None
    try:
        checkpoint = read_checkpoint(path)
        state = {k.removeprefix("unit."): v for k, v in checkpoint["state_dict"].items()}
        if not all(torch.equal(p.cpu(), state[name]) for name, p in unit.named_parameters()):
            raise KeyError("of another full-precision model")  # whose weights a resumed fit would write into this one's
        state = {k: state[k] for k in quantization_state(unit)}
        check_quantization_state(unit, state)
        if (ranks := checkpoint["ranks"]) == world_size():
            return state
        log.warning("%s is of a run on %d processes, not on %d; the unit is begun again", path, ranks, world_size())
    except (DamagedFileError, KeyError) as error:
        warn_of_damage(path, error)
    path.unlink()
    return None


def warn_of_damage(path: Path, error: DamagedFileError | KeyError) -> None:
    """Say that a file of the run is not used."""
    reason = error if isinstance(error, DamagedFileError) else f"{path} does not fit the unit"
    log.warning("%s; the unit is done again", reason)


def shifted_layer(work: Calibration, unit: nn.Module, name: str) -> tuple[QuantLayer, float] | None:
    """The quantized layer whose bias shifts the unit's output, and the factor from output to layer."""
    found = output_layer(unit, name)
    if found is None or not work.config.reconstruction.bias_correction:
        return None
    layer = quant_layers(work.quantized).get(found[0])
    return (layer, found[1]) if layer is not None and layer.bias_shift is not None else None


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels within a fit, where the device has them, so that a resumed fit is bit-identical."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(device.type == "cpu", warn_only=True)
    memory.fill_uninitialized_memory = False  # for debugging, at a pass over all memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
