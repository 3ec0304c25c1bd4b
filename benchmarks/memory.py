"""Peak anonymous memory of real runs against what their plans state, for few and many calibration samples.

    python -m benchmarks.memory
    python -m benchmarks.memory --model ddpm-cifar10-32 --host 1.0

The bound is what the plan states: models, the budget of the host, and the workspace. What a process takes
that has only imported the tool, with torch and diffusers, is subtracted.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import SHIPPED, Settings, calibration, model_path, read_json, run, train, watch

HELD_OUT = 2
"""Held-out trajectories of each run."""

IMPORTS = """
import matplotlib.figure, torch, train
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from pytorch_lightning.demos.boring_classes import BoringModel
from benchmarks.common import anonymous_memory
from tcaq_lightning.config import TrainerConfig
from tcaq_lightning.runtime.lightning import make_trainer, quiet_lightning
quiet_lightning()
make_trainer(TrainerConfig(accelerator="cpu"), [], max_steps=2).fit(BoringModel())
print(anonymous_memory())
"""
"""What a run imports at its start, and what its first fit imports."""


def import_bytes() -> int:
    """RssAnon of a process that has imported all that a run does, and has done nothing else."""
    return int(watch([sys.executable, "-c", IMPORTS]).output.splitlines()[-1])


def measure(settings: Settings, imports: int) -> dict[str, Any]:
    """Peak of one run and what its plan said.

    Args:
        settings: of the run.
        imports: from `import_bytes`.

    Returns:
        Bytes: `peak` (less imports), `models`, `store` (what the plan keeps in host memory), `budget` (what it may),
        `workspace`; `ratio` of the peak to models + budget + workspace; seconds.
    """
    ended = train(settings)
    plan = read_json(Path(settings["run_dir"]) / "manifest.json")["plan"]
    workspace = max(plan["workspace_bytes"].values())
    budget = int(plan["limits"]["host"])
    peak = ended.peak - imports
    return {
        "samples": plan["samples"],
        "peak": peak,
        "models": plan["model_bytes"],
        "budget": budget,
        "store": plan["store_bytes"]["host"],
        "store_on_disk": plan["store_bytes"]["disk"],
        "workspace": workspace,
        "workspace_by_work": plan["workspace_bytes"],
        "ratio": peak / (plan["model_bytes"] + budget + workspace),
        "ratio_to_store": peak / (plan["model_bytes"] + plan["store_bytes"]["host"] + workspace),
        "seconds": ended.seconds,
    }


def memory(
    model: str = SHIPPED,
    threads: int = 1,
    samples: tuple[int, ...] = (256, 4096),
    host: float = 0.5,
    sampler_steps: int = 16,
    iterations: int = 20,
    batch_size: int = 32,
    rounds: int = 1,
) -> dict[str, Any]:
    """Compare peaks with plans.

    Args:
        model: shipped model, model of random weights, or directory.
        threads: CPU threads.
        samples: numbers of calibration samples, multiples of sampler_steps; two trajectories of them are held out.
        host: budget for stored activations in host memory, in GB; the rest goes to files.
        sampler_steps: samples of a trajectory, and timestep groups.
        iterations: optimisation steps of a unit.
        batch_size: samples a step.
        rounds: rounds after the first.
    """
    imports = import_bytes()
    runs = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = model_path(model, directory)
        for count in samples:
            learned = count // sampler_steps - HELD_OUT
            settings = calibration(
                directory / f"run-{count}", path, threads, learned, HELD_OUT, sampler_steps, iterations, batch_size
            ) | {"calibration.memory_budget.host": host, "par.rounds": rounds}
            runs.append(measure(settings, imports))
    return {
        "model": model,
        "threads": threads,
        "imports": imports,
        "runs": runs,
        "worst_ratio": max(r["ratio"] for r in runs),
    }


if __name__ == "__main__":
    run(memory)
