"""Fixtures of several rooms.

What they build with is imported when one is asked for: the process that hands the tests to others needs none of it, and
would import torch, diffusers and Lightning while they wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.finished_run import run_dir, trained  # noqa: F401 - fixtures of several rooms


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., Any]:
    """Builds small deterministic UNets: (size, channels, head_dim, attention)."""
    from tests import twins

    return twins.make_unet


@pytest.fixture(scope="session")
def make_twins() -> Callable[..., Any]:
    """Builds `Twins` with neutral quantizers: (config, samples, what `make_unet` takes)."""
    from tests import twins

    return twins.make_twins


@pytest.fixture(scope="session")
def observe() -> Callable[..., Any]:
    """Ranges, histograms and fits of a unit over all its data: (unit, data, timestep groups)."""
    from tests import twins

    return twins.observe


@pytest.fixture(scope="session")
def initialized() -> Callable[..., Any]:
    """Sets a unit's quantizers from all its data: (twins, name, tcr, daq)."""
    from tests import twins

    return twins.initialized
