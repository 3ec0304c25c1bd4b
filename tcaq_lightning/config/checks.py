"""Checks of values that name the whole key."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcaq_lightning.config.values import check_types
from tcaq_lightning.errors import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
FLOAT_BITS = 16
"""Code width that stands for no codes at all: activations stay in floating point."""
LEAST_THREADS = 32
"""CPU threads that may be asked for on any machine."""
PLAIN = "a number, a text, a list or a mapping, as a file of settings can hold it"


@dataclass
class Section:
    """A part of the configuration that stands in one place. It is checked when it is made."""

    def __post_init__(self) -> None:
        check_types(self, type(self).__name__)
        self.check()

    def check(self) -> None:
        """Check that all values can be worked with, those too that were set after the section was made.

        Raises:
            UserError: one cannot; the message names its whole key.
        """


def require(ok: bool, key: str, expected: str, got: object) -> None:
    """Check that a value is what is expected.

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
    """Check that a code width is in 2..8, or not given."""
    require(bits is None or 2 <= bits <= 8, key, "in 2..8", bits)


def require_activation_bits(bits: int | None, key: str) -> None:
    """Check that a code width is in 2..8, or 16 for floating point, or not given."""
    require(bits is None or 2 <= bits <= 8 or bits == FLOAT_BITS, key, "in 2..8, or 16 for floating point", bits)


def require_share(value: float, key: str) -> None:
    """Check that a value is in [0, 1]."""
    require(0 <= value <= 1, key, "in [0, 1]", value)


def require_factor(value: float, key: str, most: float = 1e6) -> None:
    """Check that a value is finite and widens, or leaves what it multiplies.

    Args:
        value: the value.
        key: its whole key.
        most: largest value allowed.
    """
    require(1 <= value < math.inf, key, "finite and at least 1", value)
    require(value <= most, key, f"at most {most:g}", value)


def require_rate(value: float, key: str, most: float = 1e6) -> None:
    """Check that a value is finite, not negative and not absurd.

    Args:
        value: the value.
        key: its whole key.
        most: largest value allowed.
    """
    require(0 <= value < math.inf, key, "finite and at least 0", value)
    require(value <= most, key, f"at most {most:g}", value)


def require_positive(value: float, key: str, most: float = 1e6) -> None:
    """Check that a value is finite, above 0 and not absurd.

    Args:
        value: the value.
        key: its whole key.
        most: largest value allowed.
    """
    require(0 < value < math.inf, key, "finite and positive", value)
    require(value <= most, key, f"at most {most:g}", value)


def require_count(value: int | None, key: str, least: int = 1, most: int = 10**9) -> None:
    """Check that a number of things is neither too small nor absurd, or not given.

    Args:
        value: the value.
        key: its whole key.
        least: smallest value allowed.
        most: largest value allowed.
    """
    require(value is None or value >= least, key, f"at least {least}", value)
    require(value is None or value <= most, key, f"at most {most}", value)


def require_threads(value: int | None, key: str) -> None:
    """Check that a number of CPU threads is one that this machine can work with, or not given."""
    most = max(LEAST_THREADS, 2 * (os.cpu_count() or 1))
    require(value is None or value >= 1, key, "at least 1 or null", value)
    require(value is None or value <= most, key, f"at most {most} on this machine", value)


def require_text(value: str | Path | None, key: str) -> None:
    """Check that a name or path holds something, and no control characters, or is not given."""
    text = value if value is None else str(value)
    require(text is None or text.strip() != "", key, "not empty", text)
    require(text is None or not _CONTROL.search(text), key, "without control characters", text)
    require(text is None or _is_encodable(text), key, "a text that files can be named after", text)


def _is_encodable(text: str) -> bool:
    """Whether a text has bytes: not with half a character, unless it stands for a byte of a path."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def require_plain(value: Any, key: str) -> None:
    """Check that a setting is made of numbers, texts, lists and mappings, as a file of settings can hold them."""
    require(value is None or isinstance(value, (bool, int, float, str, list, tuple, dict)), key, PLAIN, type(value))
    if isinstance(value, float):
        require(math.isfinite(value), key, "finite", value)
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for name, part in parts:
        require_plain(part, f"{key}.{name}" if isinstance(value, dict) else f"{key}[{name}]")
