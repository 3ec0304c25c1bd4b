"""Where exported files go: checked before the work, and put there whole after it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.files import naming


def target_file(output: Path, name: str, suffix: str, others: Iterable[str]) -> Path:
    """The file that is meant by an option; a wrong suffix or place is found out before the work.

    Args:
        output: a file with that suffix, or a directory.
        name: of the file in a directory, without its suffix.
        suffix: of the format.
        others: suffixes of other formats.

    Raises:
        UserError: a suffix of another format, or a place where nothing can be written.
    """
    if output.suffix in set(others) - {suffix}:
        raise UserError(f"{output}: expected a name that ends in {suffix}, or a directory, for this --format")
    target = output if output.suffix == suffix else output / f"{name}{suffix}"
    nearest = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    if target.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{output}: expected a file or directory that can be written; choose another path")
    return target


def put_in_place(scratch: Path, directory: Path) -> list[Path]:
    """Put the files of a directory in another one, each whole; they are copied to that file system first."""
    files = sorted(scratch.iterdir())
    with naming(directory):
        directory.mkdir(parents=True, exist_ok=True)
        incoming = Path(tempfile.mkdtemp(prefix=".export.", dir=directory))
        try:
            for file in files:
                shutil.copyfile(file, incoming / file.name)
            for file in files:
                (incoming / file.name).replace(directory / file.name)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
    return [directory / file.name for file in files]
