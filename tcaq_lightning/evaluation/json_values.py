"""Measured figures as JSON, which knows neither NaN nor infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """The same JSON-ready values with None for NaN and infinity.

    Args:
        value: numbers, texts, lists and mappings of these, however nested.

    >>> finite({"mse": [0.5, float("inf")]})
    {'mse': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
