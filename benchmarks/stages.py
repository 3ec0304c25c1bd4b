"""Share of a calibration's wall time by stage.

    python -m benchmarks.stages --iterations 1000
    python -m benchmarks.stages --run_dir runs/fashion-mnist-ddpm-w4a8       a finished run

`outside_share` is everything that is neither the optimisation loop nor the evaluation after it: observation, searches,
store, gate, trajectories, mismatch, plan, and start-up.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import SHIPPED, calibration, model_path, read_json, run, train
from tcaq_lightning.calibration.planning.cost import EVALUATION
from tcaq_lightning.cli import parse_config

LOOP = ("learn_r", "learn_v")


def shares(stages: dict[str, float], wall: float | None = None) -> dict[str, Any]:
    """Seconds and shares by stage.

    Args:
        stages: seconds by stage, of metrics.json.
        wall: seconds of the whole command; None takes the sum of the stages.
    """
    known = sum(stages.values())
    rest = {} if wall is None else {"other": wall - known}
    seconds = {**stages, **rest}
    total = sum(s for stage, s in seconds.items() if stage not in EVALUATION)
    loop = sum(seconds.get(stage, 0.0) for stage in LOOP)
    return {
        "seconds": seconds,
        "calibration_seconds": total,
        "share": {stage: s / total for stage, s in seconds.items() if stage not in EVALUATION},
        "outside_share": 1 - loop / total,
    }


def stages(
    model: str = SHIPPED,
    run_dir: Path | None = None,
    threads: int = 1,
    iterations: int = 1000,
    trajectories: int = 64,
    held_out: int = 8,
    sampler_steps: int = 20,
    batch_size: int = 32,
    rounds: int = 1,
) -> dict[str, Any]:
    """Measure a run, or read a finished one.

    Args:
        model: shipped model, model of random weights, or directory.
        run_dir: a finished run to read; the other options are then without meaning.
        threads: CPU threads.
        iterations: optimisation steps of a unit.
        trajectories: calibration trajectories.
        held_out: further ones.
        sampler_steps: samples of each, and timestep groups.
        batch_size: samples a step.
        rounds: rounds after the first.
    """
    if run_dir is not None:
        config, _ = parse_config(["--config", str(run_dir / "config.yaml")])
        return {
            "model": config.model.path,
            "threads": config.trainer.threads,
            "iterations": config.reconstruction.iterations,
            **shares(read_json(run_dir / "metrics.json")["stages"]),
        }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        run_dir, path = directory / "run", model_path(model, directory)
        settings = calibration(run_dir, path, threads, trajectories, held_out, sampler_steps, iterations, batch_size)
        ended = train(settings | {"par.rounds": rounds})
        seconds = read_json(directory / "run" / "metrics.json")["stages"]
    return {"model": model, "threads": threads, "iterations": iterations, **shares(seconds, ended.seconds)}


if __name__ == "__main__":
    run(stages)
