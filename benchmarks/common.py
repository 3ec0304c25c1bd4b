"""What the benchmarks share: models, runs of train.py, memory of a process, the JSON line."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from jsonargparse import auto_cli
from torch import nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import denoiser_settings, find_architecture, known_architectures
from tcaq_lightning.models.pipelines import quiet_diffusers
from tcaq_lightning.runtime.exit_codes import run_cli
from tcaq_lightning.runtime.precision import bfloat16_is_fast

ROOT = Path(__file__).parents[1]
MODELS = Path(__file__).with_name("models")
SHIPPED = "fashion-mnist-ddpm"
BASE_CONFIG = ROOT / "configs" / "w4a8.yaml"
SAMPLING_INTERVAL = 0.01
"""Seconds between two looks at a process' memory."""

Settings = Mapping[str, Any]
"""Values of a run by dotted config key."""

SMALLEST_EVALUATION: Settings = {
    "evaluation.num_trajectories": 1,
    "evaluation.num_images": 1,
    "evaluation.batch_size": 1,
    "logging.tensorboard": False,
}
"""What a run cannot do without after its calibration."""


def run(benchmark: Callable[..., dict[str, Any] | Iterator[dict[str, Any]]]) -> None:
    """Run a benchmark with the command line's options and print what it returns as a JSON line, or each of several."""

    def command() -> None:
        found = auto_cli(benchmark, as_positional=False)
        for result in [found] if isinstance(found, dict) else found:
            print(json.dumps({"benchmark": benchmark.__name__, **result, "machine": machine()}), flush=True)

    sys.exit(run_cli(command))


def machine() -> dict[str, Any]:
    """Where it was measured."""
    instructions = torch.backends.cpu.get_cpu_capability()
    if bfloat16_is_fast(torch.device("cpu")):
        instructions += " AMX"
    return {
        "cpu": platform.processor() or platform.machine(),
        "instructions": instructions,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def denoiser_config(name: str) -> dict[str, Any]:
    """Config of one of the models of random weights.

    Raises:
        UserError: there is no such model.
    """
    path = MODELS / f"{name}.json"
    if path.exists():
        config: dict[str, Any] = json.loads(path.read_text())
        return config
    try:
        return denoiser_settings(find_architecture(name))
    except UserError as error:
        known = ", ".join([*sorted(p.stem for p in MODELS.glob("*.json")), *known_architectures()])
        raise UserError(f"--model must be one of {known}, got {name!r}") from error


def make_denoiser(config: Mapping[str, Any]) -> nn.Module:
    """A denoiser with the random weights that its constructor gives it, the same ones every time."""
    denoiser_class = getattr(diffusers, config["_class_name"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser: nn.Module = denoiser_class.from_config(config)
    return denoiser.requires_grad_(False).eval()


def save_model(denoiser: nn.Module, directory: Path) -> Path:
    """Write an unconditional denoiser as a diffusers pipeline."""
    quiet_diffusers()
    pipeline: Any = DDIMPipeline(denoiser, DDIMScheduler())  # type: ignore[no-untyped-call]
    pipeline.save_pretrained(directory)
    return directory


def model_path(model: str, directory: Path) -> str:
    """What `model.path` is for a model: a shipped one and a directory as they are, others written to `directory`."""
    if model == SHIPPED or Path(model).is_dir():
        return model
    return str(save_model(make_denoiser(denoiser_config(model)), directory / model))


def calibration(
    run_dir: Path,
    model: str | Path,
    threads: int,
    trajectories: int,
    held_out: int,
    sampler_steps: int,
    iterations: int,
    batch_size: int,
) -> dict[str, Any]:
    """Settings of a run on the CPU, to which a benchmark adds its own.

    Args:
        run_dir: of the run. model: `model.path`. threads: of each process.
        trajectories: calibration trajectories. held_out: further ones, for the gate and for the mismatch.
        sampler_steps: samples of each, and timestep groups.
        iterations: optimisation steps of a unit. batch_size: samples a step.
    """
    return {
        "run_dir": run_dir,
        "model.path": model,
        "trainer.threads": threads,
        "trainer.accelerator": "cpu",
        "calibration.num_trajectories": trajectories,
        "calibration.held_out_trajectories": held_out,
        "calibration.mismatch_trajectories": held_out,
        "calibration.sampler.num_steps": sampler_steps,
        "quantization.activation.timestep_groups": sampler_steps,
        "reconstruction.iterations": iterations,
        "reconstruction.batch_size": batch_size,
        **SMALLEST_EVALUATION,
    }


def arguments(settings: Settings, config: Path = BASE_CONFIG) -> list[str]:
    """Command line of train.py: a config, by default the full method at W4A8, changed by `settings`."""
    changes = [part for key, value in settings.items() for part in (f"--{key}", _text(value))]
    return ["--config", str(config), *changes]


def _text(value: Any) -> str:
    return str(value) if isinstance(value, (str, Path)) else json.dumps(value)


def train_here(settings: Settings) -> dict[str, Any]:
    """Run train.py within this process, silently; what its metrics.json says.

    The number of this process' threads is put back.
    """
    script = importlib.import_module("train")
    threads = torch.get_num_threads()
    try:
        with mock.patch.object(sys, "argv", ["train.py", *arguments(settings)]), hidden_output():
            script.main()
    finally:
        torch.set_num_threads(threads)
    return read_json(Path(settings["run_dir"]) / "metrics.json")


@contextlib.contextmanager
def hidden_output() -> Iterator[None]:
    """Keep stdout for the JSON line."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@dataclass
class Ended:
    """A command that has ended.

    Attributes:
        seconds: wall time. output: its stdout.
        peak: largest RssAnon of the process, in bytes. resident: its largest resident memory, mapped files included.
    """

    seconds: float
    peak: int
    output: str
    resident: int


def train(settings: Settings, config: Path = BASE_CONFIG) -> Ended:
    """Run train.py in a process of its own and watch its memory."""
    return watch([sys.executable, str(ROOT / "train.py"), *arguments(settings, config)])


def watch(command: list[str]) -> Ended:
    """Run a command and watch its memory.

    Raises:
        UserError: it failed; its last lines are in the message.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started, peak, resident = time.perf_counter(), 0, 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors)
        try:
            while process.poll() is None:
                memory = process_memory(process.pid)
                peak = max(peak, memory.get("RssAnon", 0))
                resident = max(resident, memory.get("VmHWM", 0))
                time.sleep(SAMPLING_INTERVAL)
        finally:
            process.kill()
        seconds = time.perf_counter() - started
        for stream in (output, errors):
            stream.seek(0)
        if process.returncode:
            raise UserError(f"{' '.join(command)} ended with {process.returncode}: {errors.read()[-600:].strip()}")
        return Ended(seconds, peak, output.read(), resident)


def anonymous_memory(pid: int | str = "self") -> int:
    """RssAnon of a process in bytes; 0 once it has ended."""
    return process_memory(pid).get("RssAnon", 0)


def process_memory(pid: int | str) -> dict[str, int]:
    """Memory of a process in bytes, by kind: VmHWM, RssAnon and so on; empty once it has ended.

    Raises:
        UserError: the system does not tell.
    """
    if sys.platform != "linux":
        raise UserError(f"a process' memory is read from /proc, expected Linux, got {sys.platform}")
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {
        kind: int(value.split()[0]) * 1024 for kind, _, value in (x.partition(":") for x in lines) if " kB" in value
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def median(values: list[float]) -> float:
    """Median of at least one value."""
    return float(torch.tensor(values, dtype=torch.float64).median())
