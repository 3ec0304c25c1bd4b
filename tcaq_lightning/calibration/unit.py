"""Calibration of one unit: observe, set, learn, correct, gate (docs/method.md, "Units and order" and "The gate")."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.bias_correction import correct_bias, shifted_layer
from tcaq_lightning.calibration.callback import listeners
from tcaq_lightning.calibration.fit import PreparedUnit, fit_unit, held_out_error
from tcaq_lightning.calibration.initialize import Observations, initialize
from tcaq_lightning.calibration.observation import UnitObservation, observing
from tcaq_lightning.calibration.probes import probe_indices
from tcaq_lightning.calibration.reconstruction import Phase
from tcaq_lightning.calibration.shards import Shard
from tcaq_lightning.calibration.stage_clock import StageClock
from tcaq_lightning.calibration.state import Record, Setup
from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.calibration.unit_errors import unit_errors, weighted_sum
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.methods.sensitivity import normalized_weights
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.state import quantization_state, restore_quantization_state
from tcaq_lightning.runtime.distributed.collectives import on_main
from tcaq_lightning.runtime.lightning import make_trainer
from tcaq_lightning.runtime.memory import freed_memory_reused

log = logging.getLogger(__name__)


def reconstruct_unit(
    setup: Setup,
    visit: Visit,
    data: UnitData,
    shard: Shard,
    sensitivity: Tensor | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> Record:
    """Observe, set, learn and gate a unit; it is left in its final state of this round.

    Args:
        setup: what the calibration works on.
        visit: which unit.
        data: this rank's samples of it; their weights are set.
        shard: which of all samples those are.
        sensitivity: (G, C) what a squared error of the unit's output does to the samples; None weighs all alike.
        callbacks: Lightning callbacks of observation and fits.

    Returns:
        What was done, JSON-ready.
    """
    config, unit, clock = setup.config, setup.unit(visit), StageClock(data)
    record: Record = {"round": visit.round_index, "position": visit.position, "unit": visit.name, "kept": True}
    shifted = shifted_layer(unit, visit.name, setup.quantized) if config.reconstruction.bias_correction else None
    held_out = shard.here(some(shard.held_out, config.calibration.judged_samples))
    prepared = PreparedUnit(unit, data, shard.here(shard.train), held_out, shifted)
    if visit.round_index == 0:
        record |= _initialize(setup, visit, prepared, shard, callbacks, clock)
    incoming, roundings = quantization_state(unit), _roundings(unit)
    with clock("gate"):
        judged = unit_errors(unit, data, held_out, setup.timestep_groups, config.judged_batch_size, setup.device)
    squares = judged.squares
    data.weights = normalized_weights(torch.ones_like(squares) if sensitivity is None else sensitivity, squares)
    record["before"] = record["after"] = weighted_sum(squares, data.weights)
    if config.reconstruction.enabled and quantizers(unit):
        record |= _learn(setup, visit, prepared, shard, callbacks, clock)
        if config.reconstruction.gate and not record["learned"] <= record["before"]:
            restore_quantization_state(unit, incoming)
            record |= {"kept": False, "after": record["before"]}
            errors = record["learned"], record["before"]
            log.info("%s: learned error %.4g > %.4g: the state before is kept", visit.tag, *errors)
    record["flipped"] = float((_roundings(unit) != roundings).float().mean()) if len(roundings) else 0.0
    return record | {"seconds": clock.seconds, "executions": clock.executions, "samples": len(shard.groups)}


def _initialize(
    setup: Setup,
    visit: Visit,
    prepared: PreparedUnit,
    shard: Shard,
    callbacks: Sequence[pl.Callback],
    clock: StageClock,
) -> Record:
    """Observe a unit and set its quantizers; returns what was chosen."""
    config, unit, data = setup.config, prepared.unit, prepared.data
    with clock("observe"):
        observed = _observe(setup, unit, data, shard, callbacks)
    with clock("search"):
        groups, probes = shard.groups[shard.train], config.calibration.probe_samples
        chosen = shard.train[probe_indices(groups, setup.timestep_groups.num_groups, probes)]
        probed = shard.collected(data, chosen)
        settings = observed, config.tcr, config.daq, setup.device, config.judged_batch_size
        queries = config.calibration.probe_queries
        choices = initialize(unit, probed, setup.timestep_groups, *settings, queries)
        data.executed += probed.executed
    on_main(lambda: setup.files.statistics(visit).save(observed.tensors(), observed.to_dict()))
    for listener in listeners(callbacks):
        listener.on_unit_initialized(visit, unit, observed, choices)
    if config.reconstruction.enabled:
        with clock("gate"):
            _correct_bias(setup, prepared, shard)  # so that learning need not make up for mean errors
    return {
        "attention": {name: choice.to_dict() for name, choice in choices.attention.items()},
        "tcr_output_error": choices.reparameterization,
    }


def _observe(
    setup: Setup, unit: nn.Module, data: UnitData, shard: Shard, callbacks: Sequence[pl.Callback]
) -> Observations:
    samples = shard.here(some(shard.train, setup.config.calibration.observed_samples))
    if not len(samples):  # every rank takes part in the reductions at the end
        samples = shard.here(shard.train)[:1]
    module = UnitObservation(unit, data, samples, setup.timestep_groups, setup.config.judged_batch_size)
    trainer = make_trainer(setup.config.trainer, callbacks, device=setup.device)
    with observing(unit, setup.timestep_groups) as observed:
        trainer.predict(module, return_predictions=False)
    return observed


def _learn(
    setup: Setup,
    visit: Visit,
    prepared: PreparedUnit,
    shard: Shard,
    callbacks: Sequence[pl.Callback],
    clock: StageClock,
) -> Record:
    """Fit a unit in the phases of the round; returns its error afterwards and the share of undecided weights."""
    config, undecided = setup.config, 0.0
    if visit.round_index:
        _soften(prepared.unit, config.reconstruction.refine_logit)
    for (round_index, phase), iterations in config.phase_iterations().items():
        if round_index == visit.round_index:
            with clock(f"learn_{phase}"), freed_memory_reused(True):
                undecided = fit_unit(setup, visit, prepared, cast("Phase", phase), iterations, clock, callbacks)
    with clock("gate"):
        _correct_bias(setup, prepared, shard)
        error = held_out_error(setup, prepared)
    return {"after": error, "learned": error, "undecided": undecided}


def _correct_bias(setup: Setup, prepared: PreparedUnit, shard: Shard) -> None:
    """Shift the unit's output channels by their mean error, where a layer can take the shift."""
    if prepared.shifted is None:
        return
    samples = shard.here(some(shard.train, setup.config.calibration.bias_samples))
    batch_size = setup.config.judged_batch_size
    errors = unit_errors(prepared.unit, prepared.data, samples, setup.timestep_groups, batch_size, setup.device)
    correct_bias(prepared.shifted, errors.means)


@torch.no_grad()
def _soften(unit: nn.Module, largest: float) -> None:
    """Let roundings flip again in a later round."""
    for layer in quant_layers(unit).values():
        layer.learned_weight.logits.clamp_(-largest, largest)


@torch.no_grad()
def _roundings(unit: nn.Module) -> Tensor:
    """Hard rounding, up or down, of all weights of a unit."""
    parts = [(layer.learned_weight.logits >= 0).flatten() for layer in quant_layers(unit).values()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def some(samples: Tensor, count: int) -> Tensor:
    """About `count` of the samples, spread evenly.

    >>> some(torch.arange(10), 3)
    tensor([0, 3, 6, 9])
    """
    return samples[:: max(1, len(samples) // count)]
