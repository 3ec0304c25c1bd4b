"""Calibration of one unit: observe, set, learn, correct, gate (METHOD section 6)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.fit import fit_unit, held_out_error, shifted_layer
from tcaq_lightning.calibration.initialize import Observations, initialize
from tcaq_lightning.calibration.observation import UnitObservation, observing
from tcaq_lightning.calibration.probes import probe_indices
from tcaq_lightning.calibration.reconstruction import Phase, mean_errors, squared_errors
from tcaq_lightning.calibration.shards import Shard
from tcaq_lightning.calibration.state import Calibration
from tcaq_lightning.calibration.streams import UnitData
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.methods.sensitivity import normalized_weights
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.state import quantization_state, restore_quantization_state
from tcaq_lightning.runtime.distributed.collectives import on_main
from tcaq_lightning.runtime.files import save_tensors
from tcaq_lightning.runtime.lightning import make_trainer
from tcaq_lightning.runtime.memory import freed_memory_reused, release_freed_memory

log = logging.getLogger(__name__)


def reconstruct_unit(
    work: Calibration, round_index: int, position: int, data: UnitData, shard: Shard
) -> dict[str, Any]:
    """Observe, set, learn, gate; leaves the unit in its final state of this round and returns the record.

    Args:
        work: the calibration.
        round_index, position: which unit.
        data: this rank's samples of it.
        shard: which of all samples those are.
    """
    config, name = work.config, work.graph.names[position]
    unit = work.quantized.get_submodule(name)
    tag = f"round{round_index}/{position:02d}-{name}"
    train = shard.here(shard.train)
    held_out = shard.here(_some(shard.held_out, config.calibration.judged_samples))
    clock = _Clock(data)
    record: dict[str, Any] = {"round": round_index, "position": position, "unit": name, "kept": True}

    if round_index == 0:
        with clock("observe"):
            observed = _observe(work, unit, data, shard)
        with clock("search"):
            chosen = shard.train[
                probe_indices(shard.groups[shard.train], work.context.num_groups, config.calibration.probe_samples)
            ]
            probes = shard.collected(data, chosen)
            settings = observed, config.tcr, config.daq, work.device, config.judged_batch_size
            choices = initialize(unit, probes, work.context, *settings)
            data.executed += probes.executed
        path = work.run.statistics_file(round_index, position, name)
        on_main(lambda: save_tensors(path, observed.tensors(), observed.to_dict()))
        for listener in work.listeners:
            listener.on_unit_initialized(Visit(round_index, position, name), unit, observed, choices)
        if config.reconstruction.enabled:
            with clock("gate"):
                _correct_bias(work, unit, name, data, shard)  # so that learning need not make up for mean errors
        record["attention"] = {n: choice.to_dict() for n, choice in choices.attention.items()}
        record["tcr_output_error"] = choices.reparameterization
    incoming = quantization_state(unit)
    roundings = _roundings(unit)
    with clock("gate"):
        squares = squared_errors(unit, data, held_out, work.context, config.judged_batch_size, work.device)
    data.weights = weights = normalized_weights(work.sensitivities.get(name, torch.ones_like(squares)), squares)
    record["before"] = record["after"] = float((squares * weights).sum())
    if config.reconstruction.enabled and quantizers(unit):
        if round_index:
            _soften(unit, config.reconstruction.refine_logit)
        undecided = 0.0
        for (phase_round, phase), iterations in config.phase_iterations().items():
            if phase_round == round_index:
                with clock(f"learn_{phase}"), freed_memory_reused(True):
                    undecided = fit_unit(
                        work, unit, data, train, held_out, cast("Phase", phase), iterations, round_index, position
                    )
        with clock("gate"):
            _correct_bias(work, unit, name, data, shard)
            record["after"] = record["learned"] = held_out_error(work, unit, data, held_out)
        record["undecided"] = undecided
        if config.reconstruction.gate and not record["learned"] <= record["before"]:
            restore_quantization_state(unit, incoming)
            record |= {"kept": False, "after": record["before"]}
            log.info(
                "%s: learned error %.4g > %.4g: the state before is kept", tag, record["learned"], record["before"]
            )
    record["flipped"] = float((_roundings(unit) != roundings).float().mean()) if len(roundings) else 0.0
    record["seconds"] = clock.seconds
    record |= {"executions": clock.executions, "samples": len(shard.groups)}
    return record


def _observe(work: Calibration, unit: nn.Module, data: UnitData, shard: Shard) -> Observations:
    samples = shard.here(_some(shard.train, work.config.calibration.observed_samples))
    if not len(samples):  # every rank takes part in the reductions at the end
        samples = shard.here(shard.train)[:1]
    module = UnitObservation(unit, data, samples, work.context, work.config.judged_batch_size)
    trainer = make_trainer(work.config.trainer, work.callbacks, device=work.device)
    with observing(unit, work.context) as observed:
        trainer.predict(module, return_predictions=False)
    return observed


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


@torch.no_grad()
def _correct_bias(work: Calibration, unit: nn.Module, name: str, data: UnitData, shard: Shard) -> None:
    """Shift the unit's output channels by their mean error, by timestep group (bias correction, Nagel et al. 2019)."""
    shifted = shifted_layer(work, unit, name)
    if shifted is None:
        return
    layer, factor = shifted
    assert layer.bias_shift is not None
    samples = shard.here(_some(shard.train, work.config.calibration.bias_samples))
    errors = mean_errors(unit, data, samples, work.context, work.config.judged_batch_size, work.device)
    corrected = layer.bias_shift + errors.to(layer.bias_shift) * factor
    layer.bias_shift.copy_(corrected.half())  # the artifact holds float16: nothing is left to round off there


def _some(samples: Tensor, count: int) -> Tensor:
    """About `count` of the samples, spread evenly."""
    return samples[:: max(1, len(samples) // count)]


class _Clock:
    """Seconds by stage, and on how many samples the unit ran in each."""

    def __init__(self, data: UnitData) -> None:
        self.data = data
        self.seconds: dict[str, float] = {}
        self.executions: dict[str, int] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started, executed = time.perf_counter(), self.data.executed
        yield
        release_freed_memory()  # else what one stage has freed lies beside what the next one takes
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        self.executions[stage] = self.executions.get(stage, 0) + self.data.executed - executed
