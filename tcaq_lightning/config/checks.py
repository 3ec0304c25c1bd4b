"""Checks of values that name the whole key."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tcaq_lightning.errors import UserError


@dataclass
class Section:
    """A part of the configuration that stands in one place. It is checked when it is made."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """See that all values can be worked with, those too that were set after the section was made.

        Raises:
            UserError: one cannot; the message names its whole key.
        """


def require(ok: bool, key: str, expected: str, got: object) -> None:
    """See that a value is what is expected.

    Args:
        ok: whether it is.
        key: the value's whole key, such as `quantization.weight.bits`.
        expected: in words, for the message.
        got: the value.

    Raises:
        UserError: it is not.
    """
    if not ok:
        raise UserError(f"{key} must be {expected}, got {got!r}")


def require_bits(bits: int | None, key: str) -> None:
    """See that a code width is in 2..8, or not given."""
    require(bits is None or 2 <= bits <= 8, key, "in 2..8", bits)


def require_share(value: float, key: str) -> None:
    """See that a value is in [0, 1]."""
    require(0 <= value <= 1, key, "in [0, 1]", value)


def require_factor(value: float, key: str) -> None:
    """See that a value is finite and widens, or leaves what it multiplies."""
    require(1 <= value < math.inf, key, "finite and at least 1", value)


def require_count(value: int | None, key: str, least: int = 1) -> None:
    """See that a number of things is large enough, or not given."""
    require(value is None or value >= least, key, f"at least {least}", value)
