"""A model of what a calibration costs, held against measured runs and applied to large models.

    python -m benchmarks.cost --runs '[runs/fashion-mnist-ddpm-w4a8, runs/fashion-mnist-ddpm-w4a4]'
    python -m benchmarks.cost --ranks 8 --device_tflops 40

Time is counted in forward passes of the full-precision denoiser, one sample each; what a pass takes is measured (for a
run, on this machine with the run's threads) or follows from its operations and an assumed throughput of the device.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import denoiser_config, median, read_json, run
from tcaq_lightning.calibration.planning.cost import (
    DEVICE_TFLOPS,
    EVALUATION,
    FITTED,
    RANK_EFFICIENCY,
    Rates,
    calibration_passes,
    forward_flops,
    passes,
    seconds_on_devices,
)
from tcaq_lightning.calibration.planning.footprint import TrialWork, unit_samples
from tcaq_lightning.calibration.storage import GIGABYTE
from tcaq_lightning.calibration.streams import store_peaks
from tcaq_lightning.cli import parse_config
from tcaq_lightning.config import CalibrationConfig, Config, PARConfig, ReconstructionConfig
from tcaq_lightning.models.architectures import example_samples, on_meta
from tcaq_lightning.models.graph import trace_units
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline, sample_shape
from tcaq_lightning.runtime.allocation_trace import SIZES

HOUR = 3600.0


def check(run_dir: Path, rates: Rates, repetitions: int = 3) -> dict[str, Any]:
    """Predicted against measured seconds of a finished run, by stage, on the machine that it ran on.

    Args:
        run_dir: of the run.
        rates: costs of a pass by stage.
        repetitions: of the forward pass that is timed.
    """
    config, _ = parse_config(["--config", str(run_dir / "config.yaml")])
    measured = read_json(run_dir / "metrics.json")["stages"]
    plan = read_json(run_dir / "manifest.json")["plan"]
    forward = forward_seconds(config, repetitions)
    counted = passes(config, config.calibration.sampler.num_steps, rates)
    stages = {
        stage: {"predicted": counted[stage] * forward, "measured": measured[stage]}
        for stage in counted
        if measured.get(stage)
    }
    both = [s for stage, s in stages.items() if stage not in EVALUATION]
    predicted, total = (sum(s[side] for s in both) for side in ("predicted", "measured"))
    return {
        "run_dir": str(run_dir),
        "forward_ms": 1e3 * forward,
        "stages": stages,
        "predicted_seconds": predicted,
        "measured_seconds": total,
        "ratio": predicted / total,
        "planned_seconds": plan["seconds"],
        "planned_gb": (plan["model_bytes"] + sum(plan["store_bytes"].values())) / GIGABYTE,
    }


def forward_seconds(config: Config, repetitions: int) -> float:
    """Median seconds of a full-precision forward pass, by sample of a batch of the reconstruction's size."""
    threads = torch.get_num_threads()
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    _, denoiser = find_denoiser(open_pipeline(config.model.path))
    x = torch.randn(config.reconstruction.batch_size, *sample_shape(denoiser))
    seconds = []
    with torch.no_grad():
        for _ in range(repetitions + 1):
            started = time.perf_counter()
            denoiser(x, torch.full((len(x),), 500), return_dict=False)
            seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return median(seconds[1:]) / len(x)


def predict(
    name: str, config: Config, rates: Rates, ranks: int, device_tflops: float, rank_efficiency: float
) -> dict[str, Any]:
    """Hours and gigabytes of a calibration of a large model.

    Args:
        name: of a shipped architecture.
        config: samples, iterations and so on.
        rates: costs of a pass by stage.
        ranks: devices.
        device_tflops: of each, as reached in these models' convolutions and matrix products.
        rank_efficiency: share of `ranks` times the throughput of one that they reach together.
    """
    denoiser = on_meta(denoiser_config(name))
    flops = forward_flops(denoiser, example_samples(denoiser, 1))
    samples = example_samples(denoiser, SIZES[1])
    graph = trace_units(denoiser, lambda: samples.predict(denoiser))
    units = unit_samples(denoiser, graph, samples)
    data = config.calibration
    counted = passes(config, data.sampler.num_steps, rates)
    calibration = calibration_passes(config, data.sampler.num_steps, rates)
    seconds = seconds_on_devices(calibration, flops, ranks, device_tflops, rank_efficiency)
    count = data.sampler.num_steps * (data.num_trajectories + data.held_out_trajectories)
    stored = getattr(torch, data.storage)
    kinds = [[(tuple(x.shape[1:]), x.dtype) for x in units[n].inputs] for n in graph.names]
    no_limits = {"device": 0.0, "host": float("inf"), "disk": 0.0}
    store = store_peaks(graph, kinds, count, torch.float32, stored, no_limits)["host"]  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in denoiser.parameters())
    batch_of_each = max(1, config.reconstruction.batch_size // ranks)
    one = dataclasses.replace(
        config, reconstruction=dataclasses.replace(config.reconstruction, batch_size=batch_of_each)
    )
    return {
        "model": name,
        "parameters_millions": parameters / 1e6,
        "units": len(graph.names),
        "forward_tflop": flops / 1e12,
        "samples": count,
        "iterations": config.reconstruction.iterations,
        "ranks": ranks,
        "hours": seconds / HOUR,
        "hours_of_loop": seconds / HOUR * (counted["learn_r"] + counted["learn_v"]) / calibration,
        "models_gb": 5 * parameters / GIGABYTE,  # W, and a byte for each code
        "workspace_gb": TrialWork(one, denoiser, graph, samples).learning_bytes() / GIGABYTE,
        "store_gb_per_rank": store / ranks / GIGABYTE,
    }


def cost(
    runs: Sequence[Path] = (),
    models: Sequence[str] = ("stable-diffusion-v1-4", "sdxl-base-1.0"),
    trajectories: int = 256,
    sampler_steps: int = 20,
    iterations: int = 5000,
    batch_size: int = 32,
    storage: str = "bfloat16",
    ranks: int = 8,
    device_tflops: float = DEVICE_TFLOPS,
    rank_efficiency: float = RANK_EFFICIENCY,
    rates: Rates = FITTED,
) -> dict[str, Any]:
    """Check the model of cost, and apply it.

    Args:
        runs: directories of finished runs, made on this machine.
        models: shipped architectures to predict for.
        trajectories: calibration trajectories of the prediction; an eighth more is held out.
        sampler_steps: samples of each.
        iterations: optimisation steps of a unit.
        batch_size: samples a step.
        storage: what stored activations are kept as, float32 or bfloat16.
        ranks: devices.
        device_tflops: throughput of a device that is assumed; 40 is about a quarter of an A100's TF32 peak.
        rank_efficiency: share of `ranks` times the throughput of one rank, assumed.
        rates: costs of a pass by stage.
    """
    held_out = max(1, trajectories // 8)
    config = Config(
        calibration=CalibrationConfig(
            num_trajectories=trajectories,
            held_out_trajectories=held_out,
            mismatch_trajectories=held_out,
            storage=storage,  # type: ignore[arg-type]
            sampler=dataclasses.replace(CalibrationConfig().sampler, num_steps=sampler_steps),
        ),
        par=PARConfig(),
        reconstruction=ReconstructionConfig(iterations=iterations, batch_size=batch_size),
    )
    return {
        "assumed": {"device_tflops": device_tflops, "rank_efficiency": rank_efficiency, "rates": vars(rates)},
        "checked": [check(Path(path), rates) for path in runs],
        "predicted": [predict(name, config, rates, ranks, device_tflops, rank_efficiency) for name in models],
    }


if __name__ == "__main__":
    run(cost)
