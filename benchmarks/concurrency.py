"""Calls of one denoiser by many threads at once, compared bit by bit with the same calls one after the other.

    python -m benchmarks.concurrency --calls 10000 --backend all --threads 8
    python -m benchmarks.concurrency --artifact runs/quickstart/quantized --calls 1000 --backend openvino

Calls differ in batch size, samples and timesteps, half of them with other timesteps for each sample. One JSON line for
each backend; `--backend all` takes those that are installed.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

from benchmarks.common import denoiser_config, make_denoiser, median, run
from benchmarks.inference import nearest
from tcaq_lightning.artifact.directory import save_artifact
from tcaq_lightning.backends.base import BACKENDS, find_backend
from tcaq_lightning.backends.graph.inputs import example_inputs, nest
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import find_denoiser

LARGEST_BATCH = 4

Call = Callable[[], Tensor]


def concurrency(
    model: str = "tiny",
    artifact: str | None = None,
    backend: str = "all",
    calls: int = 10_000,
    distinct: int = 64,
    threads: int = 8,
) -> Iterator[dict[str, Any]]:
    """Compare concurrent calls with serial ones.

    Args:
        model: of random weights, quantized to nearest, where no artifact is given.
        artifact: directory.
        backend: its name, or `all`.
        calls: made at once.
        distinct: calls that these repeat, in an order drawn at random.
        threads: that call; each call computes on one.
    """
    names = installed() if backend == "all" else [backend]
    with tempfile.TemporaryDirectory() as directory:
        path = artifact or str(write_artifact(model, Path(directory) / "quantized"))
        for name in names:
            yield {
                "model": Path(artifact).parent.name if artifact else model,
                "backend": name,
                "threads": threads,
                **compared(open_denoiser(path, name), calls, distinct, threads),
            }


def installed() -> list[str]:
    """Names of the backends that can run here."""
    found = []
    for name in BACKENDS:
        try:
            find_backend(name).check()
        except UserError:
            continue
        found.append(name)
    return found


def write_artifact(model: str, path: Path) -> Path:
    """The artifact of a model of random weights."""
    denoiser = make_denoiser(denoiser_config(model))
    nearest(denoiser, weight_bits=4, activation_bits=8, groups=20)
    pipeline: Any = DDIMPipeline(denoiser, DDIMScheduler())  # type: ignore[no-untyped-call]
    save_artifact(pipeline, "unet", denoiser, path, {})
    return path


def open_denoiser(path: str, backend: str) -> Any:
    """The denoiser of an artifact, each call of which computes on one thread."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"threads": 1} if "threads" in find_backend(backend).options else {}
    return find_denoiser(load_quantized(path, backend=backend, **options))[1]


def compared(denoiser: Any, calls: int, distinct: int, threads: int) -> dict[str, Any]:
    """Calls by themselves, then all of them at once.

    Returns:
        Number of calls, and of those that gave other bits than alone; seconds of a call alone (median) and of all
        at once.
    """
    made = [make_call(denoiser, number) for number in range(distinct)]
    seconds, expected = [], []
    for call in made:
        started = time.perf_counter()
        expected.append(call())
        seconds.append(time.perf_counter() - started)
    order = random.Random(0).choices(range(distinct), k=calls)
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        equal = list(pool.map(lambda number: torch.equal(made[number](), expected[number]), order))
        total = time.perf_counter() - started
    return {
        "calls": calls,
        "wrong": equal.count(False),
        "seconds_alone": median(seconds),
        "seconds_at_once": total,
    }


def make_call(denoiser: Any, seed: int) -> Call:
    """A call of a batch of 1 to 4 samples; of odd ones, each sample has a timestep of its own."""
    generator = torch.Generator().manual_seed(seed)
    batch = seed // 2 % LARGEST_BATCH + 1
    inputs = example_inputs(denoiser, batch=batch)
    first = next(iter(inputs))
    inputs[first] = torch.randn(inputs[first].shape, generator=generator)
    longest = inputs["timestep"].max() / 0.75  # of examples at a quarter and three quarters
    timesteps = torch.rand(batch if seed % 2 else 1, generator=generator) * longest
    inputs["timestep"] = timesteps if seed % 2 else timesteps[0]
    arguments = nest(inputs)

    @torch.no_grad()
    def call() -> Tensor:
        prediction: Tensor = denoiser(**arguments, return_dict=False)[0]
        return prediction

    return call


if __name__ == "__main__":
    run(concurrency)
