"""Inputs that are wrong at random: each is refused in one line, or works and changes nothing in silence.

python -m benchmarks.fuzz --configs 2000 --files 500 --plans 100 --seed 0
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.common import ROOT, calibration, model_path, run, train_here
from tcaq_lightning.api import open_model
from tcaq_lightning.artifact.directory import write_checksums
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.calibration.run_dir import read_manifest
from tcaq_lightning.cli import parse_config
from tcaq_lightning.config import Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.metrics.base import METRICS
from tcaq_lightning.evaluation.reference import open_reference
from tcaq_lightning.models.pipelines import open_pipeline
from tcaq_lightning.models.prompts import read_prompts
from tcaq_lightning.runtime.exit_codes import ending

BATCH = 100
"""Cases that one process works on."""
MEMORY = 4 << 30
"""Bytes of address space that such a process may take beside what it begins with."""
SECONDS = 60.0
"""Longest time of a case."""
NUMBERS = [
    0,
    -1,
    1,
    2,
    9,
    10**6,
    10**12,
    2**31,
    2**63,
    10**40,
    -(10**40),
    0.5,
    1e-300,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
]
TEXTS = [
    "",
    " ",
    "null",
    "[/]",
    "\0",
    "a\nb",
    "\x1b[2J",
    "\ud800",
    "é" * 300,
    "/dev/zero",
    "../../..",
    "{model}",
    "017",
    "*",
]
ODD: list[Any] = [*NUMBERS, *TEXTS, None, True, False, [], {}, [None], [[]], {"a": {"b": []}}, {"num_steps": -1}]
SNIPPETS = [
    "a: &a [*a]", "<<: *nothing", "&x *x", "- 1", "\t", "? [1]\n: 2", "!!python/object/apply:os.system [ls]", "{", "\0",
    "seed: 1\nseed: 2", "---", "...", "%YAML 9.9", "seed: 0x1F", "'", "\"\\ud800\"", "model: null", "quantization: []",
    "]", "sede: 1", "[" * 5000, "a: " * 50, "x" * 2000,
]  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is damaged: a finished run of a tiny model.

    Attributes:
        model: directory of the full-precision pipeline.
        run_dir: of the run, with its artifact in `quantized`.
    """

    model: Path
    run_dir: Path

    def prediction(self, denoiser: Any) -> torch.Tensor:
        """What a denoiser makes of a fixed sample."""
        size = denoiser.config.sample_size
        x = torch.randn(2, denoiser.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            predicted: torch.Tensor = denoiser(x, torch.tensor([10, 700])).sample
        return predicted


class SilentChangeError(Exception):
    """A damaged input was taken, and something else came out."""


def opened(artifact: Path) -> Any:
    """The denoiser of an artifact."""
    pipeline: Any = load_quantized(artifact)
    return pipeline.unet


def config_case(rng: random.Random, _: Subject, directory: Path) -> str:
    """A config with one to three odd values, as a file, as options, or set in Python."""
    keys = [key for key, _ in _leaves(Config().to_dict())]
    values = {rng.choice(keys): rng.choice(ODD) for _ in range(rng.randint(1, 3))}
    way = rng.choice(["yaml", "text", "options", "python"])
    if way in ("yaml", "text"):
        text = yaml.safe_dump(_nested(values))
        if way == "text":
            lines = text.splitlines()
            lines.insert(rng.randint(0, len(lines)), rng.choice(SNIPPETS))
            text = "\n".join(lines)
        file = directory / "config.yaml"
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        parse_config(["--config", str(file)])
    elif way == "options":
        parse_config([part for key, value in values.items() for part in (f"--{key}", _as_option(value))])
    else:
        config = Config()
        for key, value in values.items():
            *sections, name = key.split(".")
            owner: Any = config
            for section in sections:
                owner = getattr(owner, section)
            setattr(owner, name, value)
        config.check()
    return way


def plan_case(rng: random.Random, subject: Subject, directory: Path) -> str:
    """Numbers that the types allow, as far as the plan."""
    numeric = [key for key, value in _leaves(Config().to_dict()) if type(value) in (int, float)]
    settings = calibration(directory / "run", subject.model, 1, 2, 1, 2, 20, 2)
    settings |= {key: rng.choice(NUMBERS) for key in rng.sample(numeric, rng.randint(1, 2))}
    config, _ = parse_config([part for key, value in settings.items() for part in (f"--{key}", _as_option(value))])
    open_model(config).plan.check(config.run_dir)
    return "plan"


def artifact_case(rng: random.Random, subject: Subject, directory: Path) -> str:
    """A damaged artifact: by accident, or on purpose with checksums that fit."""
    artifact = Path(shutil.copytree(subject.run_dir / "quantized", directory / "quantized"))
    files = [f for f in sorted(artifact.rglob("*")) if f.is_file()]
    if on_purpose := rng.random() < 0.4:
        file = rng.choice([f for f in files if f.suffix == ".json" and f.name != "checksums.json"])
        damage_json(rng, file)
        write_checksums(artifact)
    else:
        damage_bytes(rng, rng.choice(files), files)
    expected = subject.prediction(opened(subject.run_dir / "quantized"))
    got = subject.prediction(opened(artifact))
    if not on_purpose and not torch.equal(got, expected):
        raise SilentChangeError(f"load_quantized({artifact})")
    return "artifact"


def diffusers_case(rng: random.Random, subject: Subject, directory: Path) -> str:
    """A damaged artifact, opened by diffusers' own from_pretrained; what diffusers itself refuses is its own affair."""
    folder = Path(shutil.copytree(subject.run_dir / "quantized" / "unet", directory / "unet"))
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".json", ".safetensors")]
    damage_bytes(rng, rng.choice(files), files)
    kind = type(opened(subject.run_dir / "quantized"))
    try:
        taken = kind.from_pretrained(folder)
    except UserError:
        raise
    except Exception as error:
        if any("tcaq_lightning" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            raise
        return "diffusers"
    if getattr(taken, "hf_quantizer", None) is None:
        raise SilentChangeError("opened without its quantization")
    if not torch.equal(
        subject.prediction(taken), subject.prediction(kind.from_pretrained(subject.run_dir / "quantized/unet"))
    ):
        raise SilentChangeError(f"from_pretrained({folder})")
    return "diffusers"


def model_case(rng: random.Random, subject: Subject, directory: Path) -> str:
    """A damaged full-precision model, whose JSON files have no checksum."""
    model = Path(shutil.copytree(subject.model, directory / "model"))
    damage_json(rng, rng.choice([model / "model_index.json", model / "scheduler" / "scheduler_config.json"]))
    open_pipeline(str(model))
    return "model"


def prompts_case(rng: random.Random, _: Subject, directory: Path) -> str:
    """A file that is to hold prompts."""
    file = directory / "prompts.txt"
    file.write_bytes(
        rng.choice([rng.randbytes(rng.randint(0, 50)), "a bag\nein Schuh\n".encode("utf-16"), b"\n\n", b"a\0b"])
    )
    read_prompts(file, "conditioning.prompts")
    return "prompts"


def statistics_case(rng: random.Random, _: Subject, directory: Path) -> str:
    """Statistics of somebody else's, with odd values, shapes and types, or damaged."""
    file = directory / "statistics.npz"
    arrays: dict[str, Any] = {"mu": np.zeros(6), "sigma": np.eye(6)}
    name = rng.choice(["mu", "sigma"])
    arrays[name] = rng.choice(
        [
            np.full(arrays[name].shape, rng.choice([math.nan, math.inf, -1.0])),
            np.array(["text"]),
            np.zeros((0, 3)),
            np.zeros((2, 2, 2)),
            np.array(1),
            np.zeros(6, dtype=complex),
            np.eye(6, dtype=bool),
            arrays[name],
        ]
    )
    np.savez(file, **arrays)
    if rng.random() < 0.5:
        damage_file(rng, file)
    open_reference(file, {"fid": METRICS["fid"].reference_needs}, 6, "")
    return "statistics"


def manifest_case(rng: random.Random, subject: Subject, directory: Path) -> str:
    """A damaged manifest of a run."""
    file = Path(shutil.copy(subject.run_dir / "manifest.json", directory / "manifest.json"))
    (damage_json if rng.random() < 0.5 else damage_file)(rng, file)
    read_manifest(file)
    return "manifest"


FILES = [
    artifact_case,
    artifact_case,
    artifact_case,
    diffusers_case,
    diffusers_case,
    model_case,
    prompts_case,
    statistics_case,
    manifest_case,
]
Case = Callable[[random.Random, Subject, Path], str]


def file_case(rng: random.Random, subject: Subject, directory: Path) -> str:
    """A damaged file of some kind."""
    return rng.choice(FILES)(rng, subject, directory)


CASES: dict[str, Case] = {"configs": config_case, "files": file_case, "plans": plan_case}


def damage_file(rng: random.Random, file: Path) -> None:
    """Change a file's bytes."""
    damage_bytes(rng, file, [file])


def damage_bytes(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Flip a bit, cut, fill, empty, repeat or remove a file, or put another one in its place."""
    content = bytearray(file.read_bytes())
    how, at = rng.choice(["flip", "cut", "fill", "empty", "repeat", "remove", "swap"]), rng.randrange(len(content))
    if how == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[at:]
    elif how == "fill":
        content[at : at + 16] = bytes([rng.randrange(256)]) * min(16, len(content) - at)
    elif how == "empty":
        content.clear()
    elif how == "repeat":
        content += content[:at]
    elif how == "swap":
        content = bytearray(rng.choice(others).read_bytes())
    if how == "remove":
        file.unlink()
    else:
        file.write_bytes(content)


def damage_json(rng: random.Random, file: Path) -> None:
    """Put an odd value into a JSON file, or another kind of JSON in its place."""
    content: Any = json.loads(file.read_text())
    places = _places(content)
    if rng.random() < 0.1 or not places:
        file.write_text(rng.choice(["[]", "null", "1", "[" * 100_000, "{", '"a"', "{}", "\0"]))
        return
    owner, key = rng.choice(places)
    if rng.random() < 0.2 and isinstance(owner, dict):
        del owner[key]
    else:
        owner[key] = rng.choice(ODD)
    file.write_text(json.dumps(content))


def outcome(case: Case, seed: str, subject: Subject) -> str:
    """How a case ends: `ok` or `refused`, with its kind; anything else is a fault."""
    with tempfile.TemporaryDirectory() as name:
        try:
            return f"ok {case(random.Random(seed), subject, Path(name))}"
        except UserError as error:
            return "refused" if "\n" not in str(error) else f"fault: several lines: {str(error)!r}"
        except BaseException as error:  # noqa: BLE001 - this is what is looked for
            if isinstance(error, OSError) and ending(error) is not None:
                return "refused"
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"fault: {type(error).__name__}: {str(error)[:200]!r} in {where.filename}:{where.lineno}"


def fuzz(
    configs: int = 2000, files: int = 500, plans: int = 100, seed: int = 0, output: Path | None = None
) -> dict[str, Any]:
    """Count what becomes of wrong inputs; every fault is listed with the seed that makes it again.

    Args:
        configs: number of configs.
        files: number of damaged files.
        plans: number of configs that are followed as far as the plan.
        seed: of all of them.
        output: file for the outcome of every case, one a line; without it, none is written.
    """
    numbers = {"configs": configs, "files": files, "plans": plans}
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        model = Path(model_path("tiny", Path(name)))
        settings = calibration(Path(name) / "run", model, 1, 2, 1, 2, 20, 2)
        train_here(settings)
        subject, lines = Subject(model, Path(name) / "run"), []
        for kind, number in numbers.items():
            for seeds in (list(range(i, min(i + BATCH, number))) for i in range(0, number, BATCH)):
                for which, found in _in_processes(kind, [f"{seed} {kind} {i}" for i in seeds], subject):
                    lines.append(f"{which}: {found}")
                    counts[f"{kind} {found.split(':')[0].split(' ')[0]}"] += 1
                    if found.startswith("fault"):
                        faults.append(lines[-1])
    if output is not None:
        output.write_text("\n".join(lines) + "\n")
    return {"seed": seed, **numbers, "counts": dict(counts), "faults": faults}


def _in_processes(kind: str, seeds: list[str], subject: Subject) -> list[tuple[str, str]]:
    """Outcomes of cases in a forked process of bounded memory; a new one goes on where one is lost."""
    done: list[tuple[str, str]] = []
    while len(done) < len(seeds):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _work(CASES[kind], seeds[len(done) :], subject, writer)
        os.close(writer)
        before = len(done)
        done += _read(reader, pid, seeds[len(done) :])
        _, status = os.waitpid(pid, 0)
        if len(done) < len(seeds) and (status or len(done) == before):
            done.append((seeds[len(done)], f"fault: lost, status {status}"))
    return done


def _work(case: Case, seeds: list[str], subject: Subject, writer: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    with os.fdopen(writer, "w", encoding="utf-8", errors="backslashreplace") as stream:
        for seed in seeds:
            stream.write(" ".join(outcome(case, seed, subject).split()) + "\n")
            stream.flush()
    os._exit(0)


def _read(reader: int, pid: int, seeds: list[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    with os.fdopen(reader, encoding="utf-8", errors="backslashreplace", buffering=1) as stream:
        for seed in seeds:
            if not select.select([stream], [], [], SECONDS)[0]:
                os.kill(pid, signal.SIGKILL)
                return found
            line = stream.readline()
            if not line:
                return found
            found.append((seed, line.strip()))
    return found


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += (
            _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(f"{prefix}{name}", value)]
        )
    return found


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        owner = found
        *sections, name = key.split(".")
        for section in sections:
            owner = owner.setdefault(section, {})
        owner[name] = value
    return found


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value: its owner, and the key or index there."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else []
    return [place for key in keys for place in [(content, key), *_places(content[key])]]


def _as_option(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, (Path, float)) else json.dumps(value)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    run(fuzz)
