"""torch.compile for units: compiled code that units of equal structure and shapes share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.errors import UserError

VARIANTS = 1024
"""Units of different structure, phases and shapes that one process may compile; torch's own limit is 8, after which it
would go on uncompiled in silence."""


def _call(unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    output: Tensor = unit(*args, **kwargs)
    return output


@functools.cache
def raise_limits() -> None:
    """Let torch compile any number of variants of any function in this process."""
    config: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    for name in (limit, f"accumulated_{limit}"):
        setattr(config, name, max(VARIANTS, getattr(config, name)))


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """One function for all units: code compiled for one unit serves every other unit that it fits."""
    raise_limits()
    return torch.compile(_call, dynamic=False)


def compiled(unit: nn.Module) -> Callable[..., Tensor]:
    """The unit's forward pass, compiled when it is called first.

    Raises:
        UserError: torch cannot compile here; the returned function raises it too.
    """
    try:
        call = _compiled()
    except RuntimeError as error:  # of a Python that torch.compile does not know
        raise _cannot_compile(error) from error

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        try:
            return call(unit, args, kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise _cannot_compile(error) from error

    return forward


def _cannot_compile(error: Exception) -> UserError:
    return UserError(
        "reconstruction.compile: expected what torch.compile needs, such as a C++ compiler, got: "
        f"{str(error).strip().splitlines()[0]}; set reconstruction.compile to false"
    )
