"""Tensors without values, in the place of tensors whose values nobody reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

META = torch.device("meta")


class Absent(Tensor):
    """Stands for a tensor whose values nobody reads. What is computed from it has no values either, and costs nothing.

    Shape, type, strides and device are those of the real tensor. What depends on values raises a RuntimeError.

    Attributes:
        shapes: a tensor of the same shape on the meta device.
    """

    shapes: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, shapes: Tensor, device: torch.device) -> Absent:
        """Stand for a tensor on `device` that is like one on the meta device."""
        made: Absent = Tensor._make_wrapper_subclass(
            cls, shapes.shape, strides=shapes.stride(), dtype=shapes.dtype, device=device
        )
        made.shapes = shapes
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Absent(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The operation, on the meta device."""
        device = next(x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Absent))

        def without_values(x: Any) -> Any:
            if isinstance(x, Absent):
                return x.shapes
            if isinstance(x, torch.device):
                return META
            return x.to(META) if isinstance(x, Tensor) else x

        found = func(*tree_map(without_values, args), **tree_map(without_values, kwargs or {}))
        return tree_map_only(Tensor, lambda x: cls.of(x, device), found)


def absent(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Absent:
    """Stand for a contiguous tensor.

    Args:
        shape: of the tensor.
        dtype: its type.
        device: where it pretends to be.

    >>> torch.cat([absent((2, 3), torch.float32, torch.device("cpu")), torch.ones(2, 1)], dim=1)
    Absent(shape=(2, 4), dtype=torch.float32)
    """
    return Absent.of(torch.empty(shape, dtype=dtype, device=META), device)
