"""What one process builds for all processes of a test run."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def shared(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A directory that is filled once, however many processes of pytest-xdist ask for it; not to be changed.

    Args:
        factory: of temporary directories.
        name: of the directory.
        build: fills the empty directory that it is given.
    """
    base = factory.getbasetemp()  # within a directory of the whole test run, if that has several processes
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)
    directory, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(directory, ignore_errors=True)  # of a process that failed
            directory.mkdir()
            build(directory)
            done.touch()
    return directory
