"""Methods of our own for single modules of classes that are not ours.

A hook can be missed, since `module.forward(...)` runs none; an instance attribute is lost where a copy is made by its
class. So a module's class is exchanged for a subclass made on the fly, as FSDP does: it has the name of the original,
so that what is saved, shown or compared by name stays as it was, and `isinstance` holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

from torch import nn


class _Provided:
    """What all classes made here derive from.

    Attributes:
        _provided_to: the class that methods were given to.
        _provided_with: classes of the methods, the last one that was given first.
    """

    _provided_to: ClassVar[type]
    _provided_with: ClassVar[tuple[type, ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and stored by the original class, which can be found by its name, and what it was given."""
        made: tuple[Any, ...] = super().__reduce_ex__(max(2, protocol))  # type: ignore[assignment]
        _, (_, *arguments), *state = made
        return _new, (self._provided_to, self._provided_with, *arguments), *state


def provide(module: nn.Module, methods: type) -> None:
    """Give one module the methods of a class, in front of its own; what it has already is not given twice.

    Args:
        module: of any class.
        methods: a class without a base or an `__init__`; `super()` leads to the module's own methods.

    >>> class Doubled:
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> layer = nn.Identity()
    >>> provide(layer, Doubled)
    >>> layer(3), layer.forward(3), layer
    (6, 6, Identity())
    """
    kind = type(module)
    given = _given(kind)
    if methods not in given:
        module.__class__ = _joined(_origin(kind), (methods, *given))


def withdraw(module: nn.Module, methods: type) -> None:
    """Take the methods of a class from a module again; nothing happens where it does not have them."""
    kind = type(module)
    given = tuple(one for one in _given(kind) if one is not methods)
    module.__class__ = _joined(_origin(kind), given) if given else _origin(kind)


def _origin(kind: type) -> type:
    return kind.__dict__.get("_provided_to", kind) if issubclass(kind, _Provided) else kind


def _given(kind: type) -> tuple[type, ...]:
    return kind.__dict__.get("_provided_with", ()) if issubclass(kind, _Provided) else ()


@functools.cache
def _joined(origin: type, given: tuple[type, ...]) -> type:
    """The class of modules that have been given the same: there is one."""
    space: dict[str, Any] = {
        "__module__": origin.__module__,
        "__qualname__": origin.__qualname__,
        "__doc__": origin.__doc__,
        "_provided_to": origin,
        "_provided_with": given,
    }
    for methods in reversed(given):
        for name, method in vars(methods).items():
            if isinstance(method, FunctionType) and hasattr(origin, name):
                space[name] = _described_as(getattr(origin, name), method)
    own = () if issubclass(origin, _Provided) else (_Provided,)
    return type(origin.__name__, (*given, *own, origin), space)


def _described_as(original: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """A method with the signature of the one that it stands before: diffusers and callers look at it."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    return method


def _new(origin: type, given: tuple[type, ...], *arguments: Any) -> Any:
    """An instance without state, which copies and unpickled ones get afterwards."""
    kind = _joined(origin, given)
    return kind.__new__(kind, *arguments)
