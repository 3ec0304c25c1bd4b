"""A model of what a calibration costs, held against measured runs and applied to large models.

    python -m benchmarks.cost --runs '[runs/fashion_mnist_w4a8, runs/fashion_mnist_w4a4]'
    python -m benchmarks.cost --ranks 8 --device_tflops 40

Time is counted in forward passes of the full-precision denoiser, one sample each; what a pass takes is measured (for a
run, on this machine with the run's threads) or follows from its operations and an assumed throughput of the device.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import denoiser_config, median, read_json, run
from benchmarks.stages import EVALUATION
from tcaq_lightning.activations import store_peaks
from tcaq_lightning.calls import Conditioning, Samples
from tcaq_lightning.config import CalibrationConfig, Config, PARConfig, ReconstructionConfig
from tcaq_lightning.initialization import PROBES
from tcaq_lightning.parsing import parse_config
from tcaq_lightning.pipelines import find_denoiser, open_pipeline, sample_shape
from tcaq_lightning.quantizers import SoftmaxQuantizer
from tcaq_lightning.quantizers.activation import per_sample
from tcaq_lightning.quantizers.uniform import fake_quantize
from tcaq_lightning.sensitivity import PROBES as SENSITIVITY_PROBES
from tcaq_lightning.storage import GIGABYTE
from tcaq_lightning.tracing import SIZES
from tcaq_lightning.unit_calibration import BIAS_SAMPLES, OBSERVED_SAMPLES
from tcaq_lightning.units import UnitGraph, trace_units
from tcaq_lightning.workspace import TrialWork, unit_samples

HOUR = 3600.0
TEXT_TOKENS, TIME_IDS = 77, 6
"""Of the text encoder of Stable Diffusion, and of the sizes that SDXL is told."""


@dataclass(frozen=True)
class Rates:
    """Costs in full-precision forward passes of as many samples.

    Attributes:
        quantized: a pass of the quantized denoiser. observe: a pass with ranges and histograms.
        learn_r, learn_v: an optimisation step. streams: a pass of the full-precision stream, and reading the inputs of
        the quantized one. search: all searches of a unit, on one of its probes. sensitivity: forward and backward.
    """

    quantized: float = 1.6
    observe: float = 1.6
    learn_r: float = 4.5
    learn_v: float = 4.5
    streams: float = 1.4
    search: float = 60.0
    sensitivity: float = 3.0


def passes(config: Config, rates: Rates) -> dict[str, float]:
    """Forward passes of one sample that each stage of a run costs.

    Args:
        config: of the run.
        rates: costs of a pass by stage.
    """
    data, calls = config.calibration, config.calibration.sampler.num_steps
    learned = [config.learned_trajectories(m) for m in range(config.num_rounds)]
    samples = [calls * (n + data.held_out_trajectories) for n in learned]
    held_out = calls * data.held_out_trajectories
    corrections = config.num_rounds + 1  # two in round 0
    batch = config.reconstruction.batch_size
    steps = dict.fromkeys(("r", "v"), 0)
    for (_, phase), iterations in config.phase_iterations().items():
        steps[phase] += iterations
    judged = 2 * held_out * config.num_rounds + corrections * min(BIAS_SAMPLES, calls * learned[0])
    redrawn = sum(calls * n * config.par.final_share * (m + 1) / config.par.rounds for m, n in enumerate(learned[1:]))
    images = config.evaluation.num_images * (config.evaluation.sampler or data.sampler).num_steps
    return {
        "trajectories": calls * len(data.indices) + rates.quantized * redrawn,
        "sensitivity": SENSITIVITY_PROBES * calls * rates.sensitivity,
        "streams": sum(samples) * rates.streams,
        "store": sum(samples) * rates.quantized,
        "observe": min(OBSERVED_SAMPLES, calls * learned[0]) * rates.observe,
        "search": PROBES * rates.search,
        "gate": judged * rates.quantized,
        "learn_r": steps["r"] * batch * rates.learn_r,
        "learn_v": steps["v"] * batch * rates.learn_v,
        "mismatch": calls * data.mismatch_trajectories * config.num_rounds * rates.quantized,
        "noise_error": config.evaluation.num_trajectories * calls * (2 + rates.quantized),
        "full_images": images,
        "quantized_images": images * rates.quantized,
    }


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
    counted = passes(config, rates)
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


def meta_denoiser(name: str) -> nn.Module:
    """A denoiser of one of the configs without weights: shapes alone."""
    config = denoiser_config(name)
    with torch.device("meta"):
        denoiser: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    return denoiser.requires_grad_(False).eval()


def inputs_of(denoiser: nn.Module, batch: int) -> Samples:
    """Inputs of a UNet on the meta device.

    Args:
        denoiser: on the meta device, conditional or not.
        batch: B.
    """

    def empty(*shape: int) -> Tensor:
        return torch.zeros(batch, *shape, device="meta")

    config: Any = denoiser.config
    conditioning: dict[str, Any] = {}
    if getattr(config, "cross_attention_dim", None) is not None:
        conditioning["encoder_hidden_states"] = empty(TEXT_TOKENS, config.cross_attention_dim)
    if getattr(config, "addition_embed_type", None) == "text_time":
        pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        conditioning["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": empty(TIME_IDS)}
    return Samples(empty(*sample_shape(denoiser)), empty(), Conditioning.of_call(conditioning, batch))


def learning_bytes(config: Config, denoiser: nn.Module, graph: UnitGraph, samples: Samples) -> int:
    """Workspace of the optimisation, as the plan states it, from shapes alone: all probabilities are uniform."""

    def uniform(quantizer: SoftmaxQuantizer, p: Tensor) -> Tensor:
        delta = per_sample(quantizer.steps(), quantizer.groups.current, p.ndim)
        return fake_quantize(p, delta, delta.new_zeros(()), delta.new_full((), 2**quantizer.bits - 1))

    with mock.patch.object(SoftmaxQuantizer, "forward", uniform):  # its own looks at values
        return TrialWork(config, denoiser, graph, samples).learning_bytes()


def predict(
    name: str, config: Config, rates: Rates, ranks: int, device_tflops: float, rank_efficiency: float
) -> dict[str, Any]:
    """Hours and gigabytes of a calibration of a large model.

    Args:
        name: of a config in benchmarks/models.
        config: samples, iterations and so on.
        rates: costs of a pass by stage.
        ranks: devices.
        device_tflops: of each, as reached in these models' convolutions and matrix products.
        rank_efficiency: share of `ranks` times the throughput of one that they reach together.
    """
    denoiser = meta_denoiser(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        inputs_of(denoiser, 1).predict(denoiser)
    flops = counter.get_total_flops()
    samples = inputs_of(denoiser, SIZES[1])
    graph = trace_units(denoiser, lambda: samples.predict(denoiser))
    units = unit_samples(denoiser, graph, samples)
    counted = passes(config, rates)
    calibration = sum(n for stage, n in counted.items() if stage not in EVALUATION)
    seconds = calibration * flops / (device_tflops * 1e12) / (ranks * (rank_efficiency if ranks > 1 else 1))
    data = config.calibration
    count = data.sampler.num_steps * (data.num_trajectories + data.held_out_trajectories)
    stored = getattr(torch, data.storage)
    kinds = [[(tuple(x.shape[1:]), x.dtype) for x in units[n].inputs] for n in graph.names]
    no_limits = {"device": 0.0, "host": float("inf"), "disk": 0.0}
    store = store_peaks(graph, kinds, count, torch.float32, stored, no_limits)["host"]  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in denoiser.parameters())
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
        "models_gb": 4 * 4 * parameters / GIGABYTE,  # W twice, V, and a state that a later round may put back
        "workspace_gb": learning_bytes(config, denoiser, graph, samples) / GIGABYTE,
        "store_gb_per_rank": store / ranks / GIGABYTE,
    }


def cost(
    runs: Sequence[Path] = (),
    models: Sequence[str] = ("stable-diffusion-v1-4", "stable-diffusion-xl"),
    trajectories: int = 256,
    sampler_steps: int = 20,
    iterations: int = 5000,
    batch_size: int = 32,
    storage: str = "bfloat16",
    ranks: int = 8,
    device_tflops: float = 40.0,
    rank_efficiency: float = 0.85,
    rates: Rates = Rates(),
) -> dict[str, Any]:
    """Check the model of cost, and apply it.

    Args:
        runs: directories of finished runs, made on this machine.
        models: configs in benchmarks/models to predict for.
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
