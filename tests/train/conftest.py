from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import DDIMPipeline, DDIMScheduler

from tcaq_lightning.calibration.run_dir import sealed
from tcaq_lightning.runtime.distributed.environment import Place
from tests.shared import shared
from tests.tiny_models import seven_units

Settings = dict[str, Any]
Fault = tuple[str, int, str]


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class Command:
    """`python train.py ARGS`, in processes forked from one that has imported everything."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __call__(
        self,
        *args: str | Path,
        fault: Fault | None = None,
        limit: int | None = None,
        kill_after: float | None = None,
        cwd: Path | None = None,
    ) -> Ended:
        """Run it; `fault`, `limit` and `cwd` as in the server, SIGKILL after `kill_after` seconds."""
        (ended,) = self._run(
            [self._job(args, fault=fault, limit=limit, cwd=None if cwd is None else str(cwd))], kill_after
        )
        return ended

    def ranks(
        self,
        *args: str | Path,
        faults: dict[int, Fault] | None = None,
        limit: int | None = None,
        script: str = "train.py",
        count: int = 2,
    ) -> list[Ended]:
        """Run it as several processes, placed as torchrun places them; `faults` by rank, `limit` for rank 0."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        places = [Place(rank, rank, count, 1, port=port) for rank in range(count)]
        return self._run(
            [
                self._job(
                    args,
                    script=script,
                    environment=place.variables(),
                    fault=(faults or {}).get(place.rank),
                    limit=None if place.rank else limit,
                )
                for place in places
            ]
        )

    def _job(self, args: tuple[str | Path, ...], **values: Any) -> dict[str, Any]:
        return {"script": "train.py", "args": [str(a) for a in args], "environment": {}, "cwd": None, **values}

    def _run(self, jobs: list[dict[str, Any]], kill_after: float | None = None) -> list[Ended]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        for number, job in enumerate(jobs):
            job |= {name: str(self.directory / f"{name}{number}") for name in ("out", "err")}
        self.server.stdin.write(json.dumps(jobs) + "\n")
        self.server.stdin.flush()
        pids = [int(pid) for pid in self.server.stdout.readline().split()]
        if kill_after is not None:
            time.sleep(kill_after)
            for pid in pids:
                with suppress(ProcessLookupError):  # it may have finished
                    os.kill(pid, signal.SIGKILL)
        codes = [int(code) for code in self.server.stdout.readline().split()]
        return [
            Ended(code, Path(job["out"]).read_text(), Path(job["err"]).read_text())
            for code, job in zip(codes, jobs, strict=True)
        ]

    def close(self) -> None:
        self.server.communicate()


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    command = Command(tmp_path_factory.mktemp("command"))
    yield command
    command.close()


def make_model(directory: Path, **changes: Any) -> Path:
    """A random denoiser of seven units, one attention among them."""
    DDIMPipeline(seven_units(), DDIMScheduler(num_train_timesteps=100, **changes)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "model", lambda root: make_model(root / "tiny")) / "tiny"


@pytest.fixture(scope="session")
def settings(model: Path) -> Settings:
    return {
        "model": {"path": str(model)},
        "calibration": {
            "num_trajectories": 4,
            "held_out_trajectories": 2,
            "mismatch_trajectories": 3,
            "batch_size": 8,
            "sampler": {"num_steps": 3},
        },
        "quantization": {"activation": {"timestep_groups": 2}},
        "tcr": {"share": 0.25},
        "par": {"rounds": 1, "share": 0.4},
        "reconstruction": {"iterations": 20, "batch_size": 4},
        "evaluation": {"num_trajectories": 2, "num_images": 4, "batch_size": 2},
        "trainer": {"checkpoint_every": 2, "threads": 1, "accelerator": "cpu"},
        "logging": {"tensorboard": False, "every_n_steps": 1, "grid_images": 4},
    }


@pytest.fixture(scope="session")
def config(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = yaml.safe_dump(settings)
    return shared(tmp_path_factory, "config", lambda root: (root / "tiny.yaml").write_text(text)) / "tiny.yaml"


@pytest.fixture(scope="session")
def undisturbed(command: Command, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN_DIR of a run that nothing disturbed; not to be changed."""

    def run(root: Path) -> None:
        ended = command("--config", config, "--run_dir", root / "run")
        assert (ended.code, ended.err) == (0, "")

    return shared(tmp_path_factory, "undisturbed", run) / "run"


@pytest.fixture
def almost_done(undisturbed: Path, tmp_path: Path) -> Path:
    """RUN_DIR of a run that was stopped before it wrote its artifact."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "quantized")
    manifest = run_dir / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["finished"], content["artifact"]
    manifest.write_text(json.dumps(sealed(content)))
    return run_dir


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a directory by their relative paths."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def changed(settings: Settings, key: str, value: Any) -> Settings:
    """A copy of nested settings with one dotted key set."""
    settings = copy.deepcopy(settings)
    *parents, last = key.split(".")
    owner = settings
    for parent in parents:
        owner = owner.setdefault(parent, {})
    owner[last] = value
    return settings
