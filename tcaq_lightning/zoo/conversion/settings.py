"""The YAML files that come with original checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tcaq_lightning.errors import UserError

T = TypeVar("T", int, float, bool, str, list[Any], dict[str, Any])
MISSING = object()


def read_yaml(path: Path) -> dict[str, Any]:
    """Content of a YAML file that holds keys and values.

    Raises:
        UserError: it is missing, unreadable or something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--architecture {path}: cannot be read ({error}); expected the checkpoint's YAML file"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"--architecture {path}: no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--architecture {path}: expected keys and values, got {type(content).__name__}")
    return content


class Section:
    """Keys and values of one part of a config; whatever is wrong with them is an error that names the key.

    Args:
        values: the keys and values.
        name: where they are in the file, such as `model.params`.
    """

    def __init__(self, values: Mapping[str, Any], name: str = "") -> None:
        self.values = values
        self.name = name

    def _key(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def get(self, key: str, kind: type[T], default: Any = MISSING) -> T:
        """A value of the given type.

        Args:
            key: its key.
            kind: an integer will do for a float, and so will a number that YAML takes for text (1e-4).
            default: for a key that is absent or null; without it, the key is required.

        Raises:
            UserError: absent, or of another type.
        """
        value = self.values.get(key)
        if value is None:
            if default is MISSING:
                raise UserError(f"--architecture: {self._key(key)} is missing; give the YAML file of this checkpoint")
            found: T = default
            return found
        try:
            if kind is float and not isinstance(value, bool):
                return kind(value)
        except (TypeError, ValueError):
            pass
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"--architecture: {self._key(key)} must be a {kind.__name__}, got {value!r}")
        return value

    def ints(self, key: str) -> list[int]:
        """A list of integers.

        Raises:
            UserError: something else.
        """
        values = self.get(key, list)
        if not all(isinstance(v, int) for v in values):
            raise UserError(f"--architecture: {self._key(key)} must be a list of integers, got {values}")
        return values

    def multipliers(self, key: str) -> list[int]:
        """Channels of each resolution, as multiples of the first convolution's.

        Raises:
            UserError: they do not begin with 1, as they do in every published model and as diffusers assumes.
        """
        values = self.ints(key)
        if values[:1] != [1]:
            raise UserError(
                f"--architecture: {self._key(key)} must begin with 1, got {values}, which has no counterpart"
            )
        return values

    def section(self, key: str) -> Section:
        """A part of this part.

        Raises:
            UserError: absent, or no keys and values.
        """
        return Section(self.get(key, dict), self._key(key))

    def only(self, known: set[str]) -> None:
        """Refuse keys that are not known, since they may change the network.

        Raises:
            UserError: there are such.
        """
        if unknown := sorted(set(self.values) - known):
            raise UserError(
                f"--architecture: {self._key(unknown[0])} is not known; expected one of {', '.join(sorted(known))}"
            )

    def must_be(self, **settings: Any) -> None:
        """Refuse other values than these, which are also the defaults.

        Raises:
            UserError: there are others.
        """
        for key, expected in settings.items():
            if (got := self.values.get(key, expected)) != expected:
                raise UserError(
                    f"--architecture: {self._key(key)} must be {expected!r}, got {got!r}, which has no counterpart"
                )
