"""A denoiser's own forward, run with other forwards in the place of some modules'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Stop(Exception):  # noqa: N818 - not an error: it ends a replay at the unit that was waited for
    """Carries the arguments of the unit at which a replay ends."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_kwargs = (args, kwargs)


@contextmanager
def patched_forwards(denoiser: nn.Module, forwards: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of named modules for a while."""
    modules = [denoiser.get_submodule(name) for name in forwards]
    for module, forward in zip(modules, forwards.values(), strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@contextmanager
def dtype_at_hand(denoiser: nn.Module) -> Iterator[None]:
    """Make the denoiser's `dtype` a constant within: diffusers walks all modules each time it is asked."""
    kind = type(denoiser)
    if not isinstance(getattr(kind, "dtype", None), property):
        yield
        return
    denoiser.__class__ = type(kind.__name__, (kind,), {"dtype": denoiser.dtype})
    try:
        yield
    finally:
        denoiser.__class__ = kind
