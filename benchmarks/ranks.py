"""Throughput of two ranks against twice that of one rank, one thread each.

    python -m benchmarks.ranks

Both do the same work: `reconstruction.batch_size` and all samples are those of all ranks together. An efficiency of 1
is half the seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import SHIPPED, calibration, model_path, read_json, run, train
from benchmarks.stages import LOOP
from tcaq_lightning.cost import EVALUATION


def ranks(
    model: str = SHIPPED,
    devices: int = 2,
    repetitions: int = 1,
    iterations: int = 100,
    trajectories: int = 32,
    held_out: int = 8,
    sampler_steps: int = 20,
    batch_size: int = 32,
    rounds: int = 1,
    images: int = 64,
) -> dict[str, Any]:
    """Run with one rank and with several, in turn.

    Args:
        model: shipped model, model of random weights, or directory.
        devices: number of ranks to compare with one.
        repetitions: of either side.
        iterations: optimisation steps of a unit.
        trajectories: calibration trajectories.
        held_out: further ones.
        sampler_steps: samples of each, and timestep groups.
        batch_size: samples a step, over all ranks.
        rounds: rounds after the first.
        images: same-noise images that the quality is measured on.
    """
    outcomes: dict[int, list[dict[str, Any]]] = {1: [], devices: []}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = model_path(model, directory)
        for repetition in range(repetitions):
            for count, found in outcomes.items():
                run_dir = directory / f"run-{count}-{repetition}"
                settings = calibration(
                    run_dir, path, 1, trajectories, held_out, sampler_steps, iterations, batch_size
                ) | {
                    "trainer.devices": count,
                    "par.rounds": rounds,
                    "evaluation.num_trajectories": held_out,
                    "evaluation.num_images": images,
                    "evaluation.batch_size": 64,
                }
                ended = train(settings)
                found.append(_outcome(read_json(run_dir / "metrics.json"), ended.seconds))
    best = {count: {k: min(o[k] for o in found) for k in found[0]} for count, found in outcomes.items()}
    one, many = best[1], best[devices]
    efficiency = {k.removesuffix("_seconds"): one[k] / many[k] / devices for k in one if k.endswith("_seconds")}
    return {"model": model, "devices": devices, "efficiency": efficiency, "one": one, "many": many}


def _outcome(metrics: dict[str, Any], wall: float) -> dict[str, float]:
    """Seconds of the loop, of the calibration and of the command; what the result is worth."""
    stages = metrics["stages"]
    return {
        "loop_seconds": sum(stages.get(stage, 0.0) for stage in LOOP),
        "calibration_seconds": sum(s for stage, s in stages.items() if stage not in EVALUATION),
        "command_seconds": wall,
        "noise_error": metrics["noise_error"]["summary"],
        "image_mse": metrics["same_noise"]["mse"],
    }


if __name__ == "__main__":
    run(ranks)
