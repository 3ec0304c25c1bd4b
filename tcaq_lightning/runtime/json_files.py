"""JSON files that others have written: bounded in size and depth, and every fault of theirs a ValueError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST = 1 << 28
"""Bytes of a file."""


def read_json(path: Path) -> Any:
    """Content of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON in UTF-8, or larger or deeper than any file of ours.
    """
    with path.open("rb") as stream:  # some files, such as devices, have no end
        content = stream.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST} bytes")
    return parse_json(content)


def parse_json(content: bytes | str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or too deep.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: it is nested too deep
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
