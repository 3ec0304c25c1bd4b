"""Tensors of modules that are elsewhere between calls: accelerate moves them to the device for a call alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

T = TypeVar("T")


def reading(module: nn.Module, read: Callable[[], T]) -> T:
    """What is read of a module outside of its own call, its tensors being where they are within one.

    Args:
        module: whose tensors are read.
        read: gives what is wanted of it.
    """
    hook = module.__dict__.get("_hf_hook")  # accelerate's
    if hook is None:
        return read()
    hook.pre_forward(module)
    try:
        return read()
    finally:
        hook.post_forward(module, None)
