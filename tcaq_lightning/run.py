"""RUN_DIR: what a run has written, and what a repeated command may go on with."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import yaml

from tcaq_lightning import __version__
from tcaq_lightning.config import UNRELATED_TO_RESULT, Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.files import write_bytes, write_json

log = logging.getLogger(__name__)


class Run:
    """The directory of one calibration run; the run's truth is here and not in a Trainer.

    Args:
        config: the run's configuration; a directory made with another one that affects the result is refused.

    Attributes:
        directory: RUN_DIR. manifest: hash, versions, model, plan, and what is finished.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = config.run_dir
        self.manifest: dict[str, Any] = {}

    @property
    def finished(self) -> bool:
        return bool(self.manifest.get("finished"))

    def read(self) -> None:
        """Look at what an earlier command left.

        Raises:
            UserError: it was made with other settings, or is no run directory.
        """
        path = self.directory / "manifest.json"
        if not path.exists():
            if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
                raise UserError(
                    f"run_dir: {self.directory} is not empty and holds no run; expected a new or empty directory"
                )
            return
        try:
            self.manifest = json.loads(path.read_text())
            earlier = self.manifest["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"run_dir: {path} is damaged ({error}); remove {self.directory} to start again") from error
        changed = [key for key in _differences(earlier, self.config.to_dict()) if not _may_change(key)]
        if changed:
            key = changed[0]
            raise UserError(
                f"{key} is {_lookup(self.config.to_dict(), key)!r} but {self.directory} was made with "
                f"{_lookup(earlier, key)!r}; use another run_dir or the same value"
            )

    def start(self, **facts: Any) -> None:
        """Write the configuration and the manifest."""
        content = self.config.to_dict()
        write_bytes(self.directory / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.manifest |= {"config": content, "config_sha256": digest, "version": __version__, **facts}
        self._write()

    def finish(self, **facts: Any) -> None:
        """Note that everything is done."""
        self.manifest |= {"finished": True, **facts}
        self._write()

    def _write(self) -> None:
        write_json(self.directory / "manifest.json", self.manifest)

    def round_dir(self, round_index: int) -> Path:
        return self.directory / "rounds" / f"{round_index:02d}"

    def unit_file(self, round_index: int, position: int, name: str) -> Path:
        """Finished state of a unit."""
        return self.round_dir(round_index) / "units" / f"{position:03d}-{name}.safetensors"

    def checkpoint(self, round_index: int, position: int, phase: str) -> Path:
        """Checkpoint of the fit that is running."""
        return self.round_dir(round_index) / f"unit-{position:03d}-{phase}.ckpt"

    def remove_temporaries(self) -> None:
        """Remove what a killed process was writing."""
        for path in self.directory.rglob(".*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two configurations differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if a == b else [prefix]


def _may_change(key: str) -> bool:
    return key.split(".")[0] in UNRELATED_TO_RESULT


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
