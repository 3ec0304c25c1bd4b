"""One Lightning fit of a unit, resumed from its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.activations import UnitData
from tcaq_lightning.calibration import Calibration
from tcaq_lightning.files import CheckedCheckpointIO, DamagedFileError
from tcaq_lightning.layers import QuantLayer
from tcaq_lightning.memory import freed_memory_reused
from tcaq_lightning.quantize import quant_layers, quantization_state, restore_quantization_state
from tcaq_lightning.reconstruction import BlockReconstruction, Phase
from tcaq_lightning.trainers import UnitCheckpoint, make_trainer
from tcaq_lightning.units import output_layer

log = logging.getLogger(__name__)


def fit_unit(
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
    callbacks = [*work.learners, UnitCheckpoint(path, config.trainer.checkpoint_every)]
    trainer = make_trainer(config.trainer, callbacks, work.logger, iterations, config.logging.every_n_steps)
    with deterministic(work.device), freed_memory_reused(True):
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
        warn_of_damage(path, error)
        path.unlink()
        return False
    return True


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
