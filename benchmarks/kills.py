"""Runs that signals end at random moments, started again until they are done, against one that nobody disturbs.

python -m benchmarks.kills --runs 20
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Settings, arguments, calibration, model_path, run
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.exit_codes import EXIT_INTERRUPTED, EXIT_TERMINATED

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
"""What ends runs, one after the other."""
ENDED_BY_SIGNAL = (-signal.SIGKILL, EXIT_TERMINATED, EXIT_INTERRUPTED)


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a directory by their relative paths."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def attempt(
    settings: Settings, kill_after: float | None = None, number: signal.Signals = signal.SIGKILL
) -> tuple[bool, float]:
    """Run train.py until it ends, or for so many seconds after its first line, when a signal ends it.

    Returns:
        Whether it ended by itself, and the seconds from its first line to its end.

    Raises:
        UserError: it failed.
    """
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    started = time.perf_counter()
    try:
        _, errors = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        _, errors = process.communicate()
        if process.returncode in ENDED_BY_SIGNAL:
            return False, time.perf_counter() - started
    if process.returncode:
        raise UserError(f"train.py ended with {process.returncode} after {first.strip()!r}: {errors.strip()[-600:]}")
    return True, time.perf_counter() - started


def kills(
    model: str = "tiny",
    runs: int = 20,
    kills_each: int = 3,
    seed: int = 0,
    iterations: int = 40,
    sampler_steps: int = 4,
    devices: int = 1,
    compile_kernels: bool | None = None,
) -> dict[str, Any]:
    """Count the killed runs that end in the undisturbed run's artifact, byte by byte.

    Args:
        model: model of random weights, shipped model, or directory.
        runs: number of killed runs.
        kills_each: how often each is killed at most, and once at least; the last command of each is left alone.
        seed: of the moments, which are spread evenly over what the undisturbed run takes.
        iterations: optimisation steps of a unit.
        sampler_steps: samples of a trajectory.
        devices: number of ranks.
        compile_kernels: whether kernels are compiled; None as the config has it.
    """
    rng = random.Random(seed)
    identical = delivered = 0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        undisturbed = directory / "undisturbed"
        settings = calibration(undisturbed, model_path(model, directory), 1, 4, 2, sampler_steps, iterations, 4) | {
            "trainer.checkpoint_every": 2,
            "evaluation.num_trajectories": 2,
            "evaluation.num_images": 4,
            "evaluation.batch_size": 2,
        }
        if devices > 1:
            settings["trainer.devices"] = devices
        if compile_kernels is not None:
            settings["reconstruction.compile_kernels"] = compile_kernels
        _, seconds = attempt(settings)
        expected = contents(undisturbed / "quantized")
        for number in range(runs):
            killed = settings | {"run_dir": directory / f"run-{number}"}
            count = 0
            while count < kills_each:
                ended, took = attempt(
                    killed, kill_after=rng.uniform(0, seconds), number=SIGNALS[delivered % len(SIGNALS)]
                )
                count += not ended
                delivered += not ended
                if ended and count:
                    break
                if ended:  # before it could be killed: once more, on a machine that is faster than it seemed
                    seconds = min(seconds, took)
                    shutil.rmtree(directory / f"run-{number}")
            attempt(killed)
            identical += contents(directory / f"run-{number}" / "quantized") == expected
    return {"model": model, "runs": runs, "identical": identical, "kills": delivered, "undisturbed_seconds": seconds}


if __name__ == "__main__":
    run(kills)
