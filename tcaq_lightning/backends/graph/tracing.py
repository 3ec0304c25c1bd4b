"""What torch's tracing exporter cannot write, in operations that it can, and in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _squeeze(x: Tensor, dim: int) -> Tensor:
    """Without an axis of size 1; the exporter, which does not know sizes behind a reshape, would write an If."""
    return x.select(dim, 0) if int(x.shape[dim]) == 1 else x


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Root mean square normalization (Zhang and Sennrich 2019, eq. 4) over the last axes."""
    axes = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
    return y if weight is None else y * weight


def _repeat_interleave(x: Tensor, repeats: int, dim: int) -> Tensor:
    """Every slice along an axis several times in sequence, whatever the axis' size is."""
    dim %= x.ndim
    expanded = x.unsqueeze(dim + 1).expand(*[-1] * (dim + 1), repeats, *[-1] * (x.ndim - dim - 1))
    return expanded.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def _reshape(x: Tensor, *sizes: int) -> Tensor:
    """With the last axis split, if that is all: the exporter takes the sizes in `x.shape[:-1]` for fixed numbers."""
    *kept, first, second = (int(size) for size in sizes)
    if kept != list(x.shape[:-1]):
        raise TypeError
    return torch.unflatten(x, -1, (first, second))


REWRITTEN: dict[Callable[..., Any], Callable[..., Tensor]] = {
    Tensor.reshape: _reshape,
    Tensor.squeeze: _squeeze,
    torch.squeeze: _squeeze,
    torch.rms_norm: _rms_norm,
    F.rms_norm: _rms_norm,
    Tensor.repeat_interleave: _repeat_interleave,
    torch.repeat_interleave: _repeat_interleave,
}
"""By torch's function: the same in other operations, for the arguments that denoisers call it with."""


class Rewriting(TorchFunctionMode):
    """Calls of functions in `REWRITTEN` go to what stands beside them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One call."""
        rewritten = REWRITTEN.get(func)
        if rewritten is not None:
            try:
                return rewritten(*args, **(kwargs or {}))
            except (TypeError, ValueError):  # other arguments than those: as torch has it
                pass
        return func(*args, **(kwargs or {}))


@contextmanager
def without_dump() -> Iterator[None]:
    """Keep the exporter from printing the whole graph when it meets an operator that it does not know."""
    print_graph = getattr(torch._C, "_jit_onnx_log", None)
    if print_graph is None:
        yield
        return
    torch._C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = print_graph
