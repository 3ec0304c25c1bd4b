"""Tables of interchangeable parts by name: what makes a new part one file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from tcaq_lightning.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Parts of one kind by name.

    A part registers itself where it is defined; no other code needs to know its file.

    Args:
        kind: what the parts are, in messages: `metric`, `backend`.

    >>> metrics = Registry[type]("metric")
    >>> @metrics.register("fid")
    ... class FID: ...
    >>> metrics["fid"].__name__, list(metrics)
    ('FID', ['fid'])
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Register the decorated object under a name.

        Args:
            name: unique among the parts of this kind.

        Raises:
            ValueError: another part has that name.
        """

        def enter(part: T) -> T:
            known = self._parts.setdefault(name, part)
            if known is not part and _origin(known) != _origin(part):  # a module that is imported again may enter anew
                raise ValueError(f"{self.kind} {name!r} is registered already, by {known!r}")
            self._parts[name] = part
            return part

        return enter

    def __getitem__(self, name: str) -> T:
        """The part of that name.

        Raises:
            UserError: there is none; the message names the nearest one.
        """
        if name not in self._parts:
            near = difflib.get_close_matches(name, self._parts, n=1, cutoff=0)
            hint = f", such as {near[0]}" if len(self._parts) > 1 else ""
            raise UserError(
                f"unknown {self.kind} {name!r}; expected one of {', '.join(sorted(self._parts))}{hint}, "
                "or one that a module in `extensions` registers"
            )
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def items(self) -> list[tuple[str, T]]:
        """Names and parts, in the order in which they were registered."""
        return list(self._parts.items())


def _origin(part: object) -> tuple[str | None, str | None]:
    return getattr(part, "__module__", None), getattr(part, "__qualname__", None)
