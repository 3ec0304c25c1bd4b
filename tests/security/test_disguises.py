"""Pickles in disguise, bombs and files without an end: nothing of them runs, nothing waits for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fuzz import Subject
from tcaq_lightning.artifact.directory import open_artifact, write_checksums
from tcaq_lightning.calibration.run_dir import read_manifest
from tcaq_lightning.cli import parse_config
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.reference import open_reference
from tcaq_lightning.models.pipelines import open_pipeline
from tcaq_lightning.models.prompts import read_prompts
from tcaq_lightning.zoo.conversion.checkpoint import read_checkpoint
from tests.evaluation.parts import parts


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


PICKLE = b"cos\nmkdir\n(S'harm'\ntR."
"""Makes a directory where somebody unpickles it."""
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 30))


def as_artifact(name: str) -> Callable[[Path, Subject], object]:
    def read(directory: Path, subject: Subject) -> object:
        artifact = Path(shutil.copytree(subject.run_dir / "quantized", directory / "q"))
        (artifact / name).write_bytes(PICKLE)
        write_checksums(artifact)
        return open_artifact(artifact)

    return read


def as_model(name: str) -> Callable[[Path, Subject], object]:
    def read(directory: Path, subject: Subject) -> object:
        model = Path(shutil.copytree(subject.model, directory / "model"))
        shutil.move(model / name, model / f"{name}.away")
        (model / name).with_suffix(".bin" if name.endswith(".safetensors") else ".json").write_bytes(PICKLE)
        return open_pipeline(str(model))

    return read


def as_file(name: str, reader: Callable[[Path], object], content: bytes = PICKLE) -> Callable[[Path, Subject], object]:
    def read(directory: Path, _: Subject) -> object:
        (directory / name).write_bytes(content)
        return reader(directory / name)

    return read


def npz(values: Any, directory: Path) -> object:
    np.savez(directory / "a.npz", mu=values, sigma=values)
    return open_reference(directory / "a.npz", parts("fid"), 6, "")


READERS: dict[str, Callable[[Path, Subject], object]] = {
    "artifact weights": as_artifact("unet/diffusion_pytorch_model.safetensors"),
    "artifact config": as_artifact("unet/config.json"),
    "artifact index": as_artifact("model_index.json"),
    "model weights": as_model("unet/diffusion_pytorch_model.safetensors"),
    "model index": as_model("model_index.json"),
    "manifest": as_file("manifest.json", read_manifest),
    "npz": as_file("a.npz", lambda path: open_reference(path, parts("fid"), 6, "")),
    "objects in npz": lambda directory, _: npz(np.array([Harmful()], dtype=object), directory),
    "statistics": as_file("a.safetensors", lambda path: open_reference(path, parts("fid"), 6, "abc")),
    "checkpoint": as_file("a.ckpt", read_checkpoint),
    "safetensors checkpoint": as_file("a.safetensors", read_checkpoint),
    "config": as_file("a.yaml", lambda path: parse_config(["--config", str(path)])),
    "bomb": as_file("a.yaml", lambda path: parse_config(["--config", str(path)]), BOMB.encode()),
    "tag": as_file(
        "a.yaml", lambda path: parse_config(["--config", str(path)]), b"!!python/object/apply:os.mkdir [harm]"
    ),
    "prompts": as_file("a.txt", lambda path: read_prompts(path, "conditioning.prompts"), PICKLE + b"\xff"),
    "endless config": lambda _, __: parse_config(["--config", "/dev/zero"]),
    "endless prompts": lambda _, __: read_prompts(Path("/dev/zero"), "conditioning.prompts"),
    "endless manifest": lambda _, __: read_manifest(Path("/dev/zero")),
}


@pytest.mark.parametrize("name", READERS)
def test_refused(name: str, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        READERS[name](tmp_path, subject)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()
