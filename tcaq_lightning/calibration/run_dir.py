"""RUN_DIR: what a run has written, and what a repeated command may go on with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tcaq_lightning.calibration.run_files import RunFiles, check_places
from tcaq_lightning.config import UNRELATED_TO_RESULT, Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.distributed.collectives import on_main
from tcaq_lightning.runtime.files import TEMPORARY, write_bytes, write_json
from tcaq_lightning.runtime.json_files import read_json
from tcaq_lightning.runtime.one_line import one_line
from tcaq_lightning.runtime.version import VERSION


class Run:
    """The directory of one calibration run; the run's truth is here and not in a Trainer.

    Rank 0 alone looks at it and writes to it; the other ranks are told what it found, errors too.

    As a context it looks at what an earlier command left, and lets other commands work there afterwards.

    Args:
        config: the run's configuration; a directory made with another one that affects the result is refused.

    Attributes:
        directory: RUN_DIR.
        files: paths in it.
        manifest: hash, versions, model, plan, and what is finished.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = config.run_dir
        self.files = RunFiles(config.run_dir, config.cache_dir)
        self.manifest: dict[str, Any] = {}
        self._lock: int | None = None

    def __enter__(self) -> Run:
        self.read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def finished(self) -> bool:
        """Whether the run has written its report."""
        return bool(self.manifest.get("finished"))

    def read(self) -> None:
        """Look at what an earlier command left.

        Raises:
            UserError: it was made with other settings, or is no run directory.
        """
        self.manifest = on_main(self._read)

    def _read(self) -> dict[str, Any]:
        path = self.files.manifest
        check_places(self.directory)
        if not path.exists():
            if self.directory.exists() and not self._is_fresh():
                raise UserError(
                    f"run_dir: {self.directory} is not empty and holds no run; expected a new or empty directory"
                )
            return {}
        manifest = read_manifest(path)
        earlier = manifest["config"]
        changed = [key for key in _differences(earlier, self.config.to_dict()) if not _may_change(key)]
        if changed:
            key = changed[0]
            raise UserError(
                f"{key} is {_lookup(self.config.to_dict(), key)!r} but {self.directory} was made with "
                f"{_lookup(earlier, key)!r}; use another run_dir or the same value"
            )
        return manifest

    def start(self, **facts: Any) -> None:
        """Claim the directory, and write the manifest and the configuration.

        Raises:
            UserError: another command is at work in the directory.
        """
        on_main(lambda: self._start(facts))

    def _start(self, facts: dict[str, Any]) -> None:
        for name, digest in self.manifest.get("extensions", {}).items():
            if facts.get("extensions", {}).get(name) != digest:
                raise UserError(
                    f"extensions: {name} has changed since the run in {self.directory} was begun; use another run_dir, "
                    "or the file as it was"
                )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.directory, os.O_RDONLY)  # held until the process ends, however it ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"run_dir: another command is at work in {self.directory}; wait for it, or use another run_dir"
            ) from error
        self._remove_temporaries()
        content = self.config.to_dict()
        self.manifest |= {"config": content, "config_sha256": _digest(content)}
        self.manifest |= {"version": VERSION, "versions": versions(), **facts}
        self._write()
        write_bytes(self.directory / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())

    def release(self) -> None:
        """Let another command work in the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def finish(self, **facts: Any) -> None:
        """Note that everything is done."""
        self.manifest |= {"finished": True, **facts}
        on_main(self._write)

    def _write(self) -> None:
        write_json(self.files.manifest, self.manifest)

    def _is_fresh(self) -> bool:
        """Whether the directory is empty but for a manifest that a killed process was writing."""
        return self.directory.is_dir() and all(fnmatch(p.name, TEMPORARY) for p in self.directory.iterdir())

    def _remove_temporaries(self) -> None:
        """Remove what a killed process was writing."""
        for path in self.directory.rglob(TEMPORARY):
            path.unlink()


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest.json, checked against its own checksum.

    Raises:
        UserError: it is damaged.
    """
    try:
        manifest = read_json(path)
        if _digest(manifest["config"]) != manifest["config_sha256"]:
            raise ValueError("its checksum does not fit its configuration")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"run_dir: {path} is damaged: expected what the run wrote, got {one_line(error)}; "
            "put a copy of it back, or use another run_dir"
        ) from error
    return dict(manifest)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's bits depend on.

    >>> sorted(versions())
    ['diffusers', 'numpy', 'python', 'pytorch-lightning', 'safetensors', 'tcaq-lightning', 'torch']
    """
    packages = ("torch", "pytorch-lightning", "diffusers", "safetensors", "numpy")
    found = {"tcaq-lightning": VERSION, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in packages}


def settings_of_result(config: Config) -> dict[str, Any]:
    """The settings that determine the artifact, for its metadata: nothing about where it was made.

    >>> settings_of_result(Config())["model"]["path"]
    'fashion-mnist-ddpm'
    """
    values = _without(config.to_dict(), (*UNRELATED_TO_RESULT, "evaluation"))
    values["extensions"] = [Path(name).name if name.endswith(".py") else name for name in config.extensions]
    local, prompts = Path(config.model.path), config.conditioning.prompts
    if local.exists():
        values["model"]["path"] = local.resolve().name
    if prompts is not None:
        values["conditioning"]["prompts"] = prompts.name
    return values


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two configurations differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if a == b else [prefix]


def _without(values: dict[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Nested values without some dotted keys."""
    kept = {k: v for k, v in values.items() if f"{prefix}{k}" not in keys}
    return {k: _without(v, keys, f"{prefix}{k}.") if isinstance(v, dict) else v for k, v in kept.items()}


def _may_change(key: str) -> bool:
    return any(f"{key}.".startswith(f"{other}.") for other in UNRELATED_TO_RESULT)


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
