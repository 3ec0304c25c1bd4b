"""The weight of a quantized layer as a tensor, for code that knows no quantized layers, such as that of adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tcaq_lightning.errors import UserError


class DequantizedWeight(Tensor):
    """A weight that is dequantized anew whenever it is computed with; its shape, type and device cost nothing.

    Args:
        values: dequantizes it.
        shape: of the values.
        dtype: of the values.
        device: of the values.

    Raises:
        UserError: it is written to.
    """

    values: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, values: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> DequantizedWeight:
        """A tensor without memory of its own."""
        made: DequantizedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.values = values
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            raise _is_fixed()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # `weight.data` is the same again
            weight = args[0]
            return cls(weight.values, weight.shape, weight.dtype, weight.device)
        if func._schema.is_mutable:
            raise _is_fixed()
        return func(*tree_map_only(cls, _values, args), **tree_map_only(cls, _values, kwargs or {}))


def _values(weight: DequantizedWeight) -> Tensor:
    return weight.values()


def _is_fixed() -> UserError:
    return UserError(
        "the weights of an artifact are integers and cannot be changed; expected adapters that stay beside them: "
        "neither fused into the weights nor initialized by changing these"
    )
