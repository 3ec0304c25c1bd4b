"""Methods of our own for single modules of classes that are not ours.

A hook can be missed, since `module.forward(...)` runs none; an instance attribute is lost where a copy is made by its
class. So a module's class is exchanged for a subclass made on the fly, as FSDP does: it has the name of the original,
so that what is saved, shown or compared by name stays as it was, and `isinstance` holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, ClassVar

from torch import nn


class _Passing(type):
    """Classes that equal the one that they pass for: diffusers' `from_pipe` compares a component's type."""

    def __eq__(cls, other: object) -> bool:
        return _passes_for(cls) is _passes_for(other)

    def __hash__(cls) -> int:
        return type.__hash__(_passes_for(cls))


def _passes_for(kind: Any) -> Any:
    return vars(kind).get("_original", kind) if isinstance(kind, type) else kind


def class_passing_for(original: type, bases: tuple[type, ...], space: Mapping[str, Any]) -> Any:
    """A class of the name of another one, which it equals and derives from.

    Args:
        original: the other class.
        bases: `original` or what derives from it among them.
        space: the attributes.
    """
    kind: type = type(original)
    meta = kind if issubclass(kind, _Passing) else type("_Passing", (_Passing, *([] if kind is type else [kind])), {})
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return meta(original.__name__, bases, {**names, "_original": original, **space})


def original_class(kind: type) -> type:
    """The class that one passes for, or that one derives from that passes for it; of others, themselves."""
    return next((vars(base)["_original"] for base in kind.__mro__ if "_original" in vars(base)), kind)


class _Provided:
    """What all classes of modules with provided methods derive from.

    Attributes:
        _original: the class that methods were given to.
        _given: classes of the methods, the last one that was given first.
    """

    _original: ClassVar[type]
    _given: ClassVar[tuple[type, ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and stored by the original class, which can be found by its name, and what it was given."""
        made: tuple[Any, ...] = super().__reduce_ex__(max(2, protocol))  # type: ignore[assignment]
        _, (_, *arguments), *state = made
        return _new, (self._original, self._given, *arguments), *state


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
        module.__class__ = _joined(_passes_for(kind), (methods, *given))


def withdraw(module: nn.Module, methods: type) -> None:
    """Take the methods of a class from a module again; nothing happens where it does not have them."""
    kind = type(module)
    given = tuple(one for one in _given(kind) if one is not methods)
    module.__class__ = _joined(_passes_for(kind), given) if given else _passes_for(kind)


def with_signature(original: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is described as another one, in whose place it stands: diffusers and callers look at that."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    return method


def _given(kind: type) -> tuple[type, ...]:
    given: tuple[type, ...] = vars(kind).get("_given", ())
    return given


@functools.cache
def _joined(original: type, given: tuple[type, ...]) -> type:
    """The class of modules that have been given the same: there is one."""
    space: dict[str, Any] = {"_given": given}
    for methods in reversed(given):
        for name, method in vars(methods).items():
            if isinstance(method, FunctionType) and hasattr(original, name):
                space[name] = with_signature(getattr(original, name), method)
    own = () if issubclass(original, _Provided) else (_Provided,)
    joined: type = class_passing_for(original, (*given, *own, original), space)
    return joined


def _new(original: type, given: tuple[type, ...], *arguments: Any) -> Any:
    """An instance without state, which copies and unpickled ones get afterwards."""
    kind = _joined(original, given)
    return kind.__new__(kind, *arguments)
