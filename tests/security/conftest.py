from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fuzz import Subject


@pytest.fixture(scope="session")
def subject(trained: Path) -> Subject:
    """A finished run of a tiny model, and that model; not to be changed."""
    return Subject(trained.parent / "model", trained)
