"""Check JSON against the shape it must have, and name the first place where it differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A leaf: values of some JSON types, where True and False are not numbers."""

    name: str
    types: tuple[type, ...]

    def admits(self, value: Any) -> bool:
        """Whether a value is of this kind."""
        return isinstance(value, self.types) and (bool in self.types or not isinstance(value, bool))


@dataclass(frozen=True)
class Optional:
    """`null`, or what `shape` says; as a dictionary's value, the key may also be missing."""

    shape: Any


@dataclass(frozen=True)
class Named:
    """An object with any keys, whose values all have one shape."""

    shape: Any


NUMBER = Kind("a number", (int, float))
TEXT = Kind("a text", (str,))
FLAG = Kind("true or false", (bool,))
MEASURED = Optional(NUMBER)
"""A number, or null for one that was not finite or not measured."""


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Check that a JSON value has a shape.

    Args:
        value: as `json.loads` gives it.
        shape: a `Kind`; a one-element list for an array; a dictionary for an object with these keys, and maybe others;
            `Named`; `Optional`.
        where: name of the place for the error.

    Raises:
        ValueError: names the first place that differs, what was expected there and what it holds.

    >>> check_shape({"a": [1, 2.5]}, {"a": [NUMBER], "b": Optional(TEXT)}, "file")
    >>> check_shape({"a": [1, "x"]}, {"a": [NUMBER]}, "file")
    Traceback (most recent call last):
    ValueError: expected a number in file.a[1], got 'x'
    """
    if isinstance(shape, Optional):
        if value is not None:
            check_shape(value, shape.shape, where)
    elif isinstance(shape, Kind):
        if not shape.admits(value):
            raise ValueError(f"expected {shape.name} in {where}, got {_short(value)}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"expected an array in {where}, got {_short(value)}")
        for number, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{number}]")
    elif not isinstance(value, dict):
        raise ValueError(f"expected an object in {where}, got {_short(value)}")
    elif isinstance(shape, Named):
        for key, item in value.items():
            check_shape(item, shape.shape, f"{where}.{key}")
    else:
        for key, expected in shape.items():
            if key not in value and not isinstance(expected, Optional):
                raise ValueError(f"expected a key {key} in {where}, got none")
            check_shape(value.get(key), expected, f"{where}.{key}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
