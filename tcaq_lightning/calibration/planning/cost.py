"""What a calibration costs: time by stage, counted in forward passes of the full-precision denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tcaq_lightning.config import Config
from tcaq_lightning.models.denoiser_calls import Samples

EVALUATION = ("noise_error", "full_images", "quantized_images", "scores")
"""Stages that come after the calibration."""
DEVICE_TFLOPS, RANK_EFFICIENCY = 40.0, 0.85
"""Assumed where nothing is measured: a device's throughput in convolutions and matrix products, about a quarter of an
A100's TF32 peak, and the share of so many times one rank's throughput that several ranks reach together."""


@dataclass(frozen=True)
class Rates:
    """Costs in full-precision forward passes of as many samples.

    Attributes:
        quantized: a pass of the quantized denoiser.
        observe: a pass with ranges and histograms.
        learn_r: an optimisation step of r and the steps.
        learn_v: an optimisation step of the rounding.
        streams: a pass of the full-precision stream, and reading the inputs of the quantized one.
        store: a pass of the quantized stream, and writing its outputs.
        gate: a pass that judges a unit.
        search: all searches of a unit, on one of its probes.
        sensitivity: forward and backward.
    """

    quantized: float = 1.6
    observe: float = 2.4
    learn_r: float = 3.8
    learn_v: float = 3.4
    streams: float = 2.0
    store: float = 1.9
    gate: float = 3.5
    search: float = 45.0
    sensitivity: float = 3.0


FITTED = Rates()
"""Fitted to one calibration of the shipped model at W4A4 on one thread of a CPU with AMX, products in bfloat16; the
sensitivity is an estimate, and the search is scaled by what it was sped up by later, on AVX2."""


def passes(config: Config, calls: int, rates: Rates = FITTED) -> dict[str, float]:
    """Forward passes of one sample that each stage of a run costs.

    Args:
        config: of the run.
        calls: denoiser calls of one trajectory; with guidance a sample's rows count as calls of their own.
        rates: costs of a pass by stage.
    """
    data = config.calibration
    learned = [config.learned_trajectories(m) for m in range(config.num_rounds)]
    samples = [calls * (n + data.held_out_trajectories) for n in learned]
    held_out = calls * data.held_out_trajectories
    corrections = config.num_rounds + 1  # two in round 0
    batch = config.reconstruction.batch_size
    steps = dict.fromkeys(("r", "v"), 0)
    for (_, phase), iterations in config.phase_iterations().items():
        steps[phase] += iterations
    judged = 2 * min(data.judged_samples, held_out) * config.num_rounds + corrections * min(
        data.bias_samples, calls * learned[0]
    )
    redrawn = sum(calls * n * config.par.final_share * (m + 1) / config.par.rounds for m, n in enumerate(learned[1:]))
    sampler = config.evaluation.sampler or data.sampler
    drawn = max(config.evaluation.num_images, config.evaluation.fid_samples)
    images = drawn * calls * sampler.num_steps / data.sampler.num_steps
    return {
        "trajectories": calls * len(data.indices) + rates.quantized * redrawn,
        "sensitivity": config.sensitivity.probes * calls * rates.sensitivity,
        "streams": sum(samples) * rates.streams,
        "store": sum(samples) * rates.store,
        "observe": min(data.observed_samples, calls * learned[0]) * rates.observe,
        "search": data.probe_samples * rates.search,
        "gate": judged * rates.gate,
        "learn_r": steps["r"] * batch * rates.learn_r,
        "learn_v": steps["v"] * batch * rates.learn_v,
        "mismatch": calls * data.mismatch_trajectories * config.num_rounds * rates.quantized,
        "noise_error": config.evaluation.num_trajectories * calls * (2 + rates.quantized),
        "full_images": images,
        "quantized_images": images * rates.quantized,
    }


def calibration_passes(config: Config, calls: int, rates: Rates = FITTED) -> float:
    """Forward passes of one sample that the whole calibration costs, the evaluation after it left out.

    Args:
        config: the run's configuration.
        calls: denoiser calls of one trajectory.
        rates: costs of a pass by stage.
    """
    return sum(count for stage, count in passes(config, calls, rates).items() if stage not in EVALUATION)


def evaluation_passes(config: Config, calls: int, rates: Rates = FITTED) -> float:
    """Forward passes of one sample that the evaluation costs; decoding and features of images come on top."""
    return sum(count for stage, count in passes(config, calls, rates).items() if stage in EVALUATION)


def forward_flops(denoiser: nn.Module, sample: Samples) -> int:
    """Floating-point operations of a forward pass; values do not matter, so it may be on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        sample.predict(denoiser)
    operations: int = counter.get_total_flops()
    return operations


def seconds_on_devices(passes: float, flops: float, ranks: int, tflops: float, efficiency: float) -> float:
    """Seconds of so many forward passes.

    Args:
        passes: number of passes of one sample.
        flops: floating-point operations of a pass.
        ranks: number of devices.
        tflops: throughput of each device, in 10^12 operations a second.
        efficiency: share of their throughput that several devices reach together.
    """
    return passes * flops / (tflops * 1e12) / (ranks * (efficiency if ranks > 1 else 1))
