"""Latency and memory of one denoiser call, full precision and quantized, by backend and batch size.

Each model is measured in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcaq_lightning.artifact import load_quantized
from tcaq_lightning.cli import run_cli
from tcaq_lightning.memory import peak_memory
from tcaq_lightning.pipelines import find_denoiser, open_pipeline, sample_shape
from tcaq_lightning.run_report.cache import artifact_digest, read_cached, write_cached
from tcaq_lightning.run_report.shape import NUMBER, TEXT, Optional

FILE = Path("report") / "latency.json"
FULL = "full precision"
WARM_UP, LEAST_CALLS, LEAST_SECONDS, MOST_CALLS = 2, 5, 2.0, 200
_ROW = {
    "model": TEXT,
    "backend": TEXT,
    "batch": Optional(NUMBER),
    "seconds": Optional(NUMBER),
    "fastest": Optional(NUMBER),
    "slowest": Optional(NUMBER),
    "calls": Optional(NUMBER),
    "peak": Optional(NUMBER),
    "idle": Optional(NUMBER),
    "problem": Optional(TEXT),
}
_SHAPE = {"machine": TEXT, "threads": NUMBER, "rows": [_ROW]}

Opener = Callable[[str], nn.Module]
"""Opens a model's directory as a denoiser: called as `denoiser(x, t, return_dict=False)[0]`."""


def backends() -> dict[str, Opener]:
    """Engines that an artifact can run on, by name. Extend to add one; one that is not installed raises UserError."""
    return {"torch": lambda path: find_denoiser(load_quantized(path))[1]}


def measured_latency(run_dir: Path) -> dict[str, Any] | None:
    """What `measure_latency` has measured for the present artifact; None if nothing."""
    path = run_dir / FILE
    if not path.is_file():
        return None
    return read_cached(path, _SHAPE, artifact=artifact_digest(run_dir / "quantized"))


def measure_latency(
    run_dir: Path, config: Mapping[str, Any], batch_sizes: Sequence[int], threads: int | None = None
) -> dict[str, Any]:
    """Measure the full-precision model in PyTorch, then the artifact on every backend, on this machine's CPU.

    Args:
        run_dir: of a finished run; what is measured is kept in RUN_DIR/report/latency.json.
        config: the run's configuration, from its manifest.
        batch_sizes: samples a call.
        threads: of the CPU; None for PyTorch's choice.

    Returns:
        `machine`, `threads` and `rows`: by `model` and `backend`, a row for each `batch` with the median `seconds` of a
        call, the `fastest` and the `slowest`, the number of `calls`, the `peak` memory of the process and what it took
        before the model was opened (`idle`), both in bytes; or one row with the `problem`.
    """
    artifact = run_dir / "quantized"
    digest = artifact_digest(artifact)
    threads = threads or torch.get_num_threads()
    jobs = [(FULL, "torch", config["model"]["path"])] + [("quantized", name, str(artifact)) for name in backends()]
    rows: list[dict[str, Any]] = []
    for model, backend, path in jobs:
        job = {"model": model, "backend": backend, "path": path, "batches": sorted(batch_sizes), "threads": threads}
        rows += [{"model": model, "backend": backend, **row} for row in _in_own_process(job)]
    machine = f"{_processor()}, {os.cpu_count()} logical processors, torch {torch.__version__}"
    content = {"machine": machine, "threads": threads, "rows": rows}
    write_cached(run_dir / FILE, content, artifact=digest)
    return content


def _in_own_process(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one model, or one row with what went wrong."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
    command = [sys.executable, "-m", "tcaq_lightning.run_report.latency", json.dumps(job)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - as we are
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"its process ended with {ended.returncode}"]
        return [{"problem": lines[-1].removeprefix("error: ")}]
    rows: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    return rows


def measure_calls(open_model: Callable[[], nn.Module], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Time a denoiser's calls in this process, smallest batch first, so that each peak of memory is of its batch.

    Args:
        open_model: gives the denoiser.
        batches: ascending batch sizes.
    """
    idle = peak_memory()
    denoiser = open_model()
    shape = sample_shape(denoiser)
    t = torch.tensor(500)
    rows = []
    for batch in batches:
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        seconds: list[float] = []
        with torch.no_grad():
            for _ in range(WARM_UP):
                denoiser(x, t, return_dict=False)
            while len(seconds) < LEAST_CALLS or (sum(seconds) < LEAST_SECONDS and len(seconds) < MOST_CALLS):
                began = time.perf_counter()
                denoiser(x, t, return_dict=False)
                seconds.append(time.perf_counter() - began)
        rows.append(
            {
                "batch": batch,
                "seconds": statistics.median(seconds),
                "fastest": min(seconds),
                "slowest": max(seconds),
                "calls": len(seconds),
                "peak": peak_memory(),
                "idle": idle,
            }
        )
    return rows


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: Sequence[str]) -> int:
    """Measure one model, described by JSON, and print its rows as JSON."""
    job = json.loads(argv[0])
    torch.set_num_threads(job["threads"])

    def open_model() -> nn.Module:
        if job["model"] == FULL:
            return find_denoiser(open_pipeline(job["path"]))[1]
        return backends()[job["backend"]](job["path"])

    def command() -> None:
        sys.stdout.write(json.dumps(measure_calls(open_model, job["batches"])) + "\n")

    return run_cli(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
