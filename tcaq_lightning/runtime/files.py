"""Files of a run: written completely or not at all, and never trusted without their checksum."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tcaq_lightning.runtime.distributed.collectives import on_main

DIGEST_BYTES = hashlib.sha256().digest_size
TEMPORARY = ".*.tmp"
"""Pattern of the names that files have while they are written."""


class DamagedFileError(Exception):
    """A file of a run is truncated or altered; its content has to be computed again."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to the error of a failed write that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except SafetensorError as error:  # its own writing of files knows the number within the text alone
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it replaces `path` at the end, or goes if writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())  # else a power cut after the renaming could leave an empty file


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_checked(path: Path, content: bytes) -> None:
    """Write a file that begins with the SHA-256 of the rest."""
    write_bytes(path, hashlib.sha256(content).digest() + content)


def read_checked(path: Path) -> bytes:
    """Content of a file written by `write_checked`.

    Raises:
        DamagedFileError: the content is not what was written.
    """
    raw = path.read_bytes()
    digest, content = raw[:DIGEST_BYTES], raw[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise DamagedFileError(f"{path} is damaged: its checksum does not fit its content")
    return content


def save_tensors(path: Path, tensors: dict[str, Tensor], record: Any = None) -> None:
    """Write tensors, and a JSON-ready record beside them, as checked safetensors.

    Args:
        path: of the file.
        tensors: by name.
        record: JSON-ready values, kept in the metadata.
    """
    metadata = {"record": json.dumps(record)}
    write_checked(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors and record of a file written by `save_tensors`.

    Raises:
        DamagedFileError: truncated or altered.
    """
    content = read_checked(path)
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__", {})
        return tensors, json.loads(metadata.get("record", "null"))
    except (SafetensorError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint that `CheckedCheckpointIO` wrote.

    Raises:
        DamagedFileError: truncated or altered.
    """
    content: dict[str, Any] = torch.load(io.BytesIO(read_checked(path)), map_location=map_location, weights_only=True)
    return content


class CheckedCheckpointIO(TorchCheckpointIO):
    """Lightning checkpoints with a checksum, written atomically, read with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_checked(Path(path), buffer.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint, on rank 0 for all ranks.

        Raises:
            DamagedFileError: truncated or altered.
        """
        return on_main(lambda: read_checkpoint(Path(path), map_location))
