"""Throughput of two ranks against twice that of one rank, a core and a thread each.

    python -m benchmarks.ranks

One rank is held to one core. Throughput is that of ranks with the batch of one each; the quality, and a second
efficiency, are those of ranks that share one rank's batch, so that a step's fixed costs do not halve. All samples are
those of all ranks together. An efficiency of 1 is twice the samples a second.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import SHIPPED, calibration, model_path, read_json, run, train
from benchmarks.stages import LOOP
from tcaq_lightning.calibration.planning.cost import EVALUATION


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
        batch_size: samples a step of one rank.
        rounds: rounds after the first; 0 switches them off.
        images: same-noise images that the quality is measured on.
    """
    runs = {"one": (1, batch_size), "many": (devices, devices * batch_size), "shared_batch": (devices, batch_size)}
    outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = model_path(model, directory)
        for repetition in range(repetitions):
            for kind, (count, samples) in runs.items():
                run_dir = directory / f"run-{kind}-{repetition}"
                settings = calibration(run_dir, path, 1, trajectories, held_out, sampler_steps, iterations, samples) | {
                    "trainer.devices": count,
                    "par.enabled": rounds > 0,
                    "par.rounds": max(1, rounds),
                    "evaluation.num_trajectories": held_out,
                    "evaluation.num_images": images,
                    "evaluation.batch_size": 64,
                }
                with held_to_cores(count):
                    ended = train(settings)
                outcomes[kind].append(_outcome(read_json(run_dir / "metrics.json"), ended.seconds))
    best = {kind: {k: min(o[k] for o in found) for k in found[0]} for kind, found in outcomes.items()}
    one, many, shared = (best[kind] for kind in ("one", "many", "shared_batch"))
    efficiency = {
        "loop": one["loop_seconds"] / many["loop_seconds"],  # of devices times the samples
        "loop, one rank's batch shared": one["loop_seconds"] / shared["loop_seconds"] / devices,
        "outside the loop": one["other_seconds"] / many["other_seconds"] / devices,
    }
    return {"model": model, "devices": devices, "efficiency": efficiency, **best}


@contextmanager
def held_to_cores(count: int) -> Iterator[None]:
    """Hold commands that are started within to so many cores, where the system can: a rank's reading thread too."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _outcome(metrics: dict[str, Any], wall: float) -> dict[str, float]:
    """Seconds of the loop, of the rest of the calibration and of the command; what the result is worth."""
    stages = metrics["stages"]
    return {
        "loop_seconds": sum(stages.get(stage, 0.0) for stage in LOOP),
        "other_seconds": sum(s for stage, s in stages.items() if stage not in (*EVALUATION, *LOOP)),
        "command_seconds": wall,
        "noise_error": metrics["noise_error"]["summary"],
        "image_mse": metrics["same_noise"]["mse"],
    }


if __name__ == "__main__":
    run(ranks)
