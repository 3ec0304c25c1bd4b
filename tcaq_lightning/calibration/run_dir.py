"""RUN_DIR: what a run has written, and what a repeated command may go on with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tcaq_lightning.artifact.directory import artifact_digest
from tcaq_lightning.calibration.run_files import RunFiles, check_places
from tcaq_lightning.config import UNRELATED_TO_RESULT, Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.distributed.collectives import on_main
from tcaq_lightning.runtime.files import TEMPORARY, write_bytes, write_json
from tcaq_lightning.runtime.json_files import read_json
from tcaq_lightning.runtime.json_shape import FLAG, TEXT, Named, Optional, check_shape
from tcaq_lightning.runtime.one_line import one_line
from tcaq_lightning.runtime.version import VERSION

CHECKSUM = "sha256"
"""Key of a manifest's checksum, which is of all its other keys."""
MANIFEST = {
    "config": {},
    "version": TEXT,
    "versions": Named(TEXT),
    "run": Optional(TEXT),
    "inputs": Optional(Named(TEXT)),
    "plan": Optional({}),
    "units": Optional([TEXT]),
    "finished": Optional(FLAG),
    "artifact": Optional(TEXT),
}
"""What is read of a manifest."""


class Run:
    """The directory of one calibration run; the run's truth is here and not in a Trainer.

    Rank 0 alone looks at it and writes to it; the other ranks are told what it found, errors too.

    As a context it looks at what an earlier command left, and lets other commands work there afterwards.

    Args:
        config: the run's configuration; a directory made with another one that affects the result is refused.

    Attributes:
        directory: RUN_DIR.
        files: paths in it.
        manifest: settings, inputs, versions, plan, and what is finished; with a checksum of it all.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = config.run_dir
        self.files = RunFiles(config.run_dir, shared=config.cache_dir)
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
                f"{key} is {lookup(self.config.to_dict(), key)!r} but {self.directory} was made with "
                f"{lookup(earlier, key)!r}; use another run_dir or the same value"
            )
        return manifest

    def start(self, inputs: Mapping[str, str], **facts: Any) -> None:
        """Claim the directory, and write the manifest and the configuration.

        Args:
            inputs: by name, the hash of everything that the result depends on beside the settings.
            facts: what else the manifest says, JSON-ready.

        Raises:
            UserError: another command is at work in the directory, or the run was begun with other inputs.
        """
        self.check_inputs(inputs)
        values = _without(self.config.to_dict(), UNRELATED_TO_RESULT)
        self.files = replace(self.files, run=_digest([values, dict(inputs)])[:16])
        on_main(lambda: self._start({"inputs": dict(inputs), "run": self.files.run, **facts}))

    def check_inputs(self, inputs: Mapping[str, str]) -> None:
        """See that the run was begun with the same inputs, if it was.

        Raises:
            UserError: one has changed, is new or is gone.
        """
        earlier = self.manifest.get("inputs", inputs)
        for name in [*earlier, *(name for name in inputs if name not in earlier)]:
            was, now = (hashes.get(name) for hashes in (earlier, inputs))
            if was != now:
                expected, got = (f"hash {x[:8]}" if x else "none" for x in (was, now))
                raise UserError(
                    f"{name} is not what {self.directory} was made with: expected {expected}, got {got}; use another "
                    "run_dir, or the same input"
                )

    def check_finished(self, inputs: Mapping[str, str]) -> None:
        """See that a finished run is of these inputs, and that the artifact is the one that it wrote.

        Raises:
            UserError: it is not.
        """
        self.check_inputs(inputs)
        if on_main(lambda: artifact_digest(self.files.artifact)) != self.manifest.get("artifact"):
            raise UserError(
                f"run_dir: {self.files.artifact} is not the artifact that the finished run wrote; put that back, or "
                "use another run_dir"
            )

    def _start(self, facts: dict[str, Any]) -> None:
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
        self.manifest |= {"config": content, "version": VERSION, "versions": versions(), **facts}
        self._write()
        write_bytes(self.directory / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())

    def release(self) -> None:
        """Let another command work in the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def finish(self, **facts: Any) -> None:
        """Note that everything is done, and which artifact it gave."""
        artifact = on_main(lambda: artifact_digest(self.files.artifact))
        self.manifest |= {"finished": True, "artifact": artifact, **facts}
        on_main(self._write)

    def _write(self) -> None:
        write_json(self.files.manifest, sealed(self.manifest))

    def _is_fresh(self) -> bool:
        """Whether the directory is empty but for a manifest that a killed process was writing."""
        return self.directory.is_dir() and all(fnmatch(p.name, TEMPORARY) for p in self.directory.iterdir())

    def _remove_temporaries(self) -> None:
        """Remove what a killed process was writing."""
        for path in self.directory.rglob(TEMPORARY):
            path.unlink()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the checksum of all that it says."""
    content = {key: value for key, value in manifest.items() if key != CHECKSUM}
    return {**content, CHECKSUM: _digest(content)}


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest.json, checked against its own checksum.

    Raises:
        UserError: it is damaged, was edited, or is of an earlier version.
    """
    try:
        manifest = read_json(path)
        check_shape(manifest, MANIFEST, "it")
        if CHECKSUM not in manifest:
            raise UserError(
                f"run_dir: {path} is of version {manifest['version']}, whose runs this version does not go on with; "
                "use another run_dir"
            )
        if manifest != sealed(manifest):
            raise ValueError("its checksum does not fit its content")
    except ValueError as error:
        raise UserError(
            f"run_dir: {path} is damaged: expected what the run wrote, got {one_line(error)}; "
            "put a copy of it back, or use another run_dir"
        ) from error
    return {key: value for key, value in manifest.items() if key != CHECKSUM}


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


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of nested settings; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
