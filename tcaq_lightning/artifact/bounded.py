"""A look at a denoiser's size before it is built: a config may ask for more than any machine has."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration

LARGEST_SETTING = 1 << 24
"""Largest number that a setting of a denoiser has; those of published ones are below a million."""
MODULES_PER_LAYER = 64
"""Modules that a denoiser has at most for each row of its tables, and that many more."""


class TooLargeError(ValueError):
    """A denoiser is larger than what its artifact holds."""


def check_settings(values: Any, where: str = "config.json") -> None:
    """See that no number in a denoiser's config is absurd.

    Raises:
        ValueError: one is.
    """
    parts = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for name, value in parts:
        check_settings(value, f"{where}.{name}")
    if isinstance(values, (int, float)) and not abs(values) <= LARGEST_SETTING:
        raise ValueError(f"expected numbers of at most {LARGEST_SETTING} in {where}, got {values:g}")


def check_size(kind: Any, config: dict[str, Any], rows: int, elements: int) -> None:
    """Build a denoiser without memory, and see that it is not larger than what the artifact holds.

    Args:
        kind: its class.
        config: its settings.
        rows: of the artifact's tables.
        elements: numbers that the artifact's weights hold at most.

    Raises:
        ValueError: it is larger, or its settings are absurd.
    """
    check_settings(config)
    with torch.device("meta"), _counting(MODULES_PER_LAYER * (rows + 1), elements):
        try:
            kind.from_config(config)
        except TooLargeError:
            raise
        except Exception:  # noqa: BLE001 - it cannot be built like this; what is wrong with it is said when it is built
            return


@contextmanager
def _counting(modules: int, elements: int) -> Iterator[None]:
    """Refuse modules and parameters of this thread that are more than so many."""
    found, thread = [0, 0], threading.get_ident()

    def count(position: int, number: int, limit: int, what: str) -> None:
        if threading.get_ident() == thread:
            found[position] += number
            if found[position] > limit:
                raise TooLargeError(f"expected at most {limit} {what}, as the artifact holds, got more")

    def see_module(_: nn.Module, __: str, module: nn.Module | None) -> None:
        count(0, module is not None, modules, "modules")

    def see_parameter(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
        count(1, 0 if parameter is None else parameter.numel(), elements, "weights")

    handles = [
        registration.register_module_module_registration_hook(see_module),
        registration.register_module_parameter_registration_hook(see_parameter),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
