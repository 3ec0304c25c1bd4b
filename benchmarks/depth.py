"""Time and memory of a calibration over the number of blocks, at one memory budget.

    python -m benchmarks.depth

UNets with 8, 16 and 32 residual blocks of equal width. Time is held against the work that one forward pass is, since
twice the blocks are not exactly twice the operations; 1.1 is 4.4 times the time for 4 times the depth.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import calibration, make_denoiser, run, save_model
from benchmarks.memory import import_bytes, measure
from tcaq_lightning.models.pipelines import sample_shape


def unet_config(depth: int, channels: int, size: int) -> dict[str, Any]:
    """Config of a UNet with 8 * depth residual blocks on two levels of equal width.

    Args:
        depth: 1, 2 or 4 (2 * depth - 1 blocks a level on the way down, 2 * depth on the way up, two in the middle).
        channels: of every level.
        size: of its samples.
    """
    return {
        "_class_name": "UNet2DModel",
        "add_attention": False,
        "block_out_channels": [channels, channels],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "in_channels": 1,
        "layers_per_block": 2 * depth - 1,
        "norm_num_groups": 8,
        "out_channels": 1,
        "sample_size": size,
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    }


def depth(
    depths: tuple[int, ...] = (1, 2, 4),
    channels: int = 32,
    size: int = 16,
    threads: int = 1,
    trajectories: int = 12,
    sampler_steps: int = 16,
    iterations: int = 60,
    batch_size: int = 32,
    host: float = 0.02,
    repetitions: int = 1,
) -> dict[str, Any]:
    """Calibrate ever deeper UNets.

    Args:
        depths: numbers of blocks, in multiples of 8; the first is compared with.
        channels: width.
        size: of the samples.
        threads: CPU threads.
        trajectories: calibration trajectories; four more are held out.
        sampler_steps: samples of each, and timestep groups.
        iterations: optimisation steps of a unit.
        batch_size: samples a step.
        host: budget for stored activations in host memory, in GB; the rest goes to files.
        repetitions: runs of each depth, in turn; the fastest counts.
    """
    imports = import_bytes()
    results: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for repetition in range(repetitions):
            for k in depths:
                path = directory / f"depth-{k}"
                if not repetition:
                    results[k] = {"depth": k, "calibration_seconds": float("inf"), **_save(path, k, channels, size)}
                run_dir = directory / f"run-{k}-{repetition}"
                settings = calibration(
                    run_dir, path, threads, trajectories, 4, sampler_steps, iterations, batch_size
                ) | {"calibration.memory_budget.host": host}
                measured = measure(settings, imports)
                if measured["seconds"] < results[k]["calibration_seconds"]:
                    results[k] |= measured | {"calibration_seconds": measured["seconds"]}
    return {"threads": threads, "host": host, "runs": list(results.values()), **_compare(list(results.values()))}


def _save(path: Path, k: int, channels: int, size: int) -> dict[str, Any]:
    """Write the model; its numbers of blocks and of operations of a forward pass of one sample."""
    denoiser = make_denoiser(unet_config(k, channels, size))
    save_model(denoiser, path)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(torch.zeros(1, *sample_shape(denoiser)), torch.ones(1), return_dict=False)
    blocks = sum(isinstance(m, ResnetBlock2D) for m in denoiser.modules())
    return {"blocks": blocks, "flops": counter.get_total_flops()}


def _compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The deepest against the first."""
    first, last = runs[0], runs[-1]
    seconds, work = (last[key] / first[key] for key in ("calibration_seconds", "flops"))
    beside_models = [r["peak"] - r["models"] for r in (first, last)]
    return {
        "blocks_ratio": last["blocks"] / first["blocks"],
        "seconds_ratio": seconds,
        "flops_ratio": work,
        "seconds_per_work": seconds / work,
        "memory_ratio": beside_models[1] / beside_models[0],
    }


if __name__ == "__main__":
    run(depth)
