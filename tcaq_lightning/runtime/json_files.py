"""JSON files from other sources: limited in size and depth; every defect raises a ValueError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST = 1 << 28
"""Bytes of a file."""


def read_json(path: Path, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Content of a file.

    Args:
        path: the file.
        parse_constant: as of `json.loads`: what to make of NaN and Infinity.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON in UTF-8, or larger or more deeply nested than any file of ours.
    """
    with path.open("rb") as stream:  # some files, such as devices, have no end
        content = stream.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST} bytes")
    return parse_json(content, parse_constant)


def parse_json(content: bytes | str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: it is not JSON, or too deeply nested.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: it is nested too deep
    """
    try:
        return json.loads(content, parse_constant=parse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
