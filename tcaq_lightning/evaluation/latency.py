"""Latency and memory of one denoiser call, full precision and quantized, by backend and batch size.

Each model runs in a process of its own, so its peak memory is measured separately. The models take turns in short
spells, so other load on the machine slows all of them alike.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from tcaq_lightning.artifact.directory import artifact_digest
from tcaq_lightning.backends.base import BACKENDS
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.evaluation.cache import read_cached, write_cached
from tcaq_lightning.models.architectures import example_samples
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline
from tcaq_lightning.runtime.exit_codes import run_cli
from tcaq_lightning.runtime.extensions import load_extensions
from tcaq_lightning.runtime.json_shape import NUMBER, TEXT, Optional
from tcaq_lightning.runtime.memory import peak_memory

FILE = Path("report") / "latency.json"
FULL = "full precision"
TURNS = 5
"""Spells of each model at each batch size."""
WARM_UP, LEAST_CALLS, LEAST_SECONDS, MOST_CALLS = 1, 2, 0.4, 100
"""Of one spell."""
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
    """What opens an artifact on each backend that is timed on a CPU; one that is not installed raises UserError."""
    return {name: partial(_open, name) for name, backend in BACKENDS.items() if backend.timed}


def _open(backend: str, path: str) -> nn.Module:
    return find_denoiser(load_quantized(path, backend=backend))[1]


def measured_latency(run_dir: Path) -> dict[str, Any] | None:
    """What `measure_latency` has measured for the present artifact; None if nothing."""
    path = run_dir / FILE
    if not path.is_file():
        return None
    return read_cached(path, _SHAPE, artifact=artifact_digest(run_dir / "quantized"))


def measure_latency(
    run_dir: Path,
    config: Mapping[str, Any],
    batch_sizes: Sequence[int],
    threads: int | None = None,
    extensions: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the full-precision model in PyTorch, then the artifact on every backend, on this machine's CPU.

    Args:
        run_dir: of a finished run; what is measured is kept in RUN_DIR/report/latency.json.
        config: the run's configuration, from its manifest.
        batch_sizes: samples a call.
        threads: of the CPU; None for PyTorch's choice.
        extensions: what each process imports first, so that it knows backends and formats of a user's own.

    Returns:
        `machine`, `threads` and `rows`: by `model` and `backend`, a row for each `batch` with the median `seconds` of a
        call, the `fastest` and the `slowest`, the number of `calls`, the `peak` memory of the process and what it took
        before the model was opened (`idle`), both in bytes; or one row with the `problem`.
    """
    artifact = run_dir / "quantized"
    digest = artifact_digest(artifact)
    threads = threads or torch.get_num_threads()
    jobs = [(FULL, "torch", config["model"]["path"])] + [("quantized", name, str(artifact)) for name in backends()]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(*job, threads, extensions)) for job in jobs]
        rows = measured_in_turns(workers, sorted(set(batch_sizes)))
    machine = f"{_processor()}, {os.cpu_count()} logical processors, torch {torch.__version__}"
    content = {"machine": machine, "threads": threads, "rows": rows}
    write_cached(run_dir / FILE, content, artifact=digest)
    return content


class Worker:
    """A process that holds one model and times its calls when it is asked; a context manager.

    Args:
        model: its name, for the rows.
        backend: likewise.
        path: of the model.
        threads: of the CPU.
        extensions: what the process imports first.

    Attributes:
        problem: why it cannot measure, in one line; None while it can.
        idle: memory before the model was opened, in bytes.
    """

    def __init__(self, model: str, backend: str, path: str, threads: int, extensions: Sequence[str] = ()) -> None:
        self.model, self.backend = model, backend
        self.problem: str | None = None
        self.idle: int | None = None
        job = json.dumps(
            {"model": model, "backend": backend, "path": path, "threads": threads, "extensions": list(extensions)}
        )
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on leaving
        self._process = subprocess.Popen(  # noqa: S603 - as we are
            [sys.executable, "-m", "tcaq_lightning.evaluation.latency", job],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Worker:
        """Wait until the model is open."""
        self.idle = (self._answer() or {}).get("idle")
        return self

    def ask(self, batch: int) -> dict[str, Any] | None:
        """Have a spell of calls timed: `seconds` of each, and the process' `peak` memory; None with a problem."""
        if self.problem is not None:
            return None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; the answer says why
            self._process.stdin.write(f"{batch}\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or [f"its process ended with {code}"]
        self.problem = lines[-1].removeprefix("error: ")
        return None

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def measured_in_turns(workers: Sequence[Worker], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Rows as in `measure_latency`; ascending batch sizes, so that each peak of memory is of its batch.

    Args:
        workers: of the models.
        batches: ascending.
    """
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for batch in batches:
        seconds: list[list[float]] = [[] for _ in workers]
        for _ in range(TURNS):
            for number, worker in enumerate(workers):
                spell = worker.ask(batch)
                if spell is not None:
                    seconds[number] += spell["seconds"]
                    rows[number, batch] = {"peak": spell["peak"], "idle": worker.idle}
        for number, calls in enumerate(seconds):
            if calls:
                rows[number, batch] |= {"batch": batch, "seconds": statistics.median(calls), "calls": len(calls)}
                rows[number, batch] |= {"fastest": min(calls), "slowest": max(calls)}
    found: list[dict[str, Any]] = []
    for number, worker in enumerate(workers):
        names = {"model": worker.model, "backend": worker.backend}
        found += [{**names, **row} for (of, _), row in sorted(rows.items()) if of == number]
        if worker.problem is not None:
            found.append({**names, "problem": worker.problem})
    return found


@torch.no_grad()
def timed_calls(denoiser: nn.Module, batch: int) -> list[float]:
    """Seconds of each call of one spell, without the warm-up calls."""
    samples = example_samples(denoiser, batch)
    for _ in range(WARM_UP):
        samples.predict(denoiser)
    seconds: list[float] = []
    while len(seconds) < LEAST_CALLS or (sum(seconds) < LEAST_SECONDS and len(seconds) < MOST_CALLS):
        began = time.perf_counter()
        samples.predict(denoiser)
        seconds.append(time.perf_counter() - began)
    return seconds


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: Sequence[str], answers: TextIO) -> int:
    """Hold one model, described by JSON, and time a spell of its calls for each batch size on stdin.

    Args:
        argv: the job.
        answers: where a line of JSON goes for each.
    """
    job = json.loads(argv[0])
    torch.set_num_threads(job["threads"])

    def say(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    def command() -> None:
        load_extensions(job["extensions"])
        idle = peak_memory()
        if job["model"] == FULL:
            denoiser = find_denoiser(open_pipeline(job["path"]))[1]
        else:
            denoiser = backends()[job["backend"]](job["path"])
        say(idle=idle)
        for line in sys.stdin:
            seconds = timed_calls(denoiser, int(line))
            say(seconds=seconds, peak=peak_memory())

    return run_cli(command)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as own:
        os.dup2(2, 1)  # what a backend prints is no answer
        code = main(sys.argv[1:], own)
    sys.exit(code)
