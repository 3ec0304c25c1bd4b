"""Files of a run: written completely or not at all, and never trusted without their checksum."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tcaq_lightning.runtime.distributed.collectives import is_main, on_main
from tcaq_lightning.runtime.one_line import one_line

TEMPORARY = ".*.tmp"
"""Pattern of the names that files have while they are written."""
BLANK = b"0" * 64
"""Stands in a file where its checksum will, while that is computed."""
MARK = b'"sha256":"'
"""What stands before the checksum in a safetensors header; texts within it have their quotes escaped."""
MOST_HEADER = 100_000_000
"""Bytes of a safetensors header, by the format's own limit."""


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
    _write_pieces(path, [content])


def _write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.writelines(pieces)
        stream.flush()
        os.fsync(stream.fileno())  # else a power cut after the renaming could leave an empty file


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let one process at a time, of all that ask, do what is within; of several ranks the first one asks.

    Args:
        directory: that they work in; it is made. The lock ends with its process, however that ends.
    """
    if not is_main():
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor], record: Any = None, place: Any = None) -> None:
    """Write tensors as a safetensors file, whose metadata has a record, its place, and the checksum of all the rest.

    Args:
        path: of the file.
        tensors: by name.
        record: JSON-ready, kept beside them.
        place: JSON-ready, what the file is of; it is read again as that alone.
    """
    content = memoryview(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))
    size = int.from_bytes(content[:8], "little")
    metadata = {"place": json.dumps(place, sort_keys=True), "record": json.dumps(record), "sha256": BLANK.decode()}
    header = {"__metadata__": metadata, **json.loads(bytes(content[8 : 8 + size]))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    before, after = text.split(MARK + BLANK, 1)
    _write_sealed(path, len(text).to_bytes(8, "little") + before + MARK, memoryview(after), content[8 + size :])


def load_tensors(path: Path, place: Any = None) -> tuple[dict[str, Tensor], Any]:
    """Tensors and record of a file written by `save_tensors`.

    Args:
        path: of the file.
        place: what the file has to be of; None takes any.

    Raises:
        DamagedFileError: truncated or altered, or of another place.
    """
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    start = raw.find(MARK, 8, 8 + min(size, MOST_HEADER)) + len(MARK)
    _check(path, raw, start)
    try:
        tensors, metadata = load(raw), json.loads(raw[8 : 8 + size])["__metadata__"]
        record, found = json.loads(metadata["record"]), json.loads(metadata["place"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged: {one_line(error)}") from error
    if place is not None and found != json.loads(json.dumps(place)):
        raise DamagedFileError(f"{path} is not of {_said(place)}: it was written as {_said(found)}")
    return tensors, record


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint that `CheckedCheckpointIO` wrote.

    Raises:
        DamagedFileError: truncated or altered, or no checkpoint.
    """
    raw = path.read_bytes()
    _check(path, raw, len(raw) - len(BLANK))
    try:
        content = torch.load(io.BytesIO(raw), map_location=map_location, weights_only=True)
    except Exception as error:  # torch has many
        raise DamagedFileError(f"{path} is no checkpoint: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


class CheckedCheckpointIO(TorchCheckpointIO):
    """Lightning checkpoints, written atomically and read without pickle; their archive's comment is a checksum."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(-2, os.SEEK_END)  # the archive's last field
        buffer.write(len(BLANK).to_bytes(2, "little"))
        _write_sealed(Path(path), buffer.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint, on rank 0 for all ranks.

        Raises:
            DamagedFileError: truncated or altered, or no checkpoint.
        """
        return on_main(lambda: read_checkpoint(Path(path), map_location))


def _write_sealed(path: Path, before: bytes, *after: memoryview) -> None:
    """Write a file with its checksum between two parts; it is computed with a blank one there."""
    digest = hashlib.sha256(before)
    digest.update(BLANK)
    for piece in after:
        digest.update(piece)
    _write_pieces(path, [before, digest.hexdigest().encode(), *after])


def _check(path: Path, content: bytes, start: int) -> None:
    """See that the checksum at `start` is that of the content with a blank one there."""
    view, end = memoryview(content), start + len(BLANK)
    digest = hashlib.sha256(view[:start])
    digest.update(BLANK)
    digest.update(view[end:])
    if start < len(MARK) or content[start:end] != digest.hexdigest().encode():
        raise DamagedFileError(f"{path} is damaged: its checksum does not fit its content")


def _said(place: Any) -> str:
    """What a file is of, in words."""
    return (
        ", ".join(f"{key} {value}" for key, value in sorted(place.items())) if isinstance(place, dict) else repr(place)
    )
