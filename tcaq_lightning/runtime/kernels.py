"""Element-wise work as single passes over memory: kernels that torch.compile makes of plain formulas.

A fit does the same few formulas thousands of times, on tensors that no cache holds: one pass over them instead of one
for each operation. A formula is compiled for all sizes at once, in a second or a few for each layout and type that it
meets, and kept by torch's own cache on disk, so that it pays within a minute where compiling whole units takes many.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tcaq_lightning.runtime.compilation import raise_limits

log = logging.getLogger(__name__)

LARGE = 1 << 17
"""Values from which on a kernel is used on a CPU: the operands of several operations on fewer stay in its cache, and to
find the compiled code takes as long as some of these operations."""


class Kernel:
    """A formula on tensors, compiled for all sizes when it is first called with large ones.

    Args:
        formula: pure; what is compiled. Its gradient is its caller's business.
        by_hand: the same as a sequence of operations that suits small tensors, and large ones without a compiler; by
            default the formula itself.
        like: of an element-wise formula, for each of its results the number of the operand that it has the shape of.
            The kernel is then compiled for `collapsed` operands.

    >>> Kernel(lambda x, y: x * y + 1)(torch.tensor([2.0]), torch.tensor([3.0]))
    tensor([7.])
    """

    wanted = False
    """Of all kernels: whether they are used now. In every thread, since a GPU's backward pass has one of its own."""
    failed = False
    """Of all kernels: whether torch could not compile one, in this process."""

    def __init__(
        self, formula: Callable[..., Any], by_hand: Callable[..., Any] | None = None, like: Sequence[int] = ()
    ) -> None:
        self.formula = formula
        self.by_hand = by_hand or formula
        self.like = like

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        raise_limits()
        return torch.compile(self.formula, dynamic=True)

    def __call__(self, *operands: Any) -> Any:
        """The formula's result; the first operand's size decides whether it is worth a kernel."""
        if torch.compiler.is_compiling():  # all around it
            return self.formula(*operands)
        if not Kernel.wanted or Kernel.failed or _small(operands[0]):
            return self.by_hand(*operands)
        try:
            with torch.autocast(operands[0].device.type, enabled=False):  # one code within it and without
                return self._run([x.detach() if isinstance(x, Tensor) else x for x in operands])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, ImportError) as error:  # a missing compiler shows in many ways
            result = self.formula(*operands)  # raises what has nothing to do with compiling
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("torch cannot compile here (%s): reconstruction goes on without, slower", reason[0])
            Kernel.failed = True
            return result

    def _run(self, operands: list[Any]) -> Any:
        if not self.like:
            return self._compiled(*operands)
        count = sum(isinstance(x, Tensor) for x in operands)  # tensors come first
        results = self._compiled(*collapsed(*operands[:count]), *operands[count:])
        if isinstance(results, Tensor):
            return _uncollapsed(results, operands[self.like[0]].shape)
        return tuple(
            x if x is None else _uncollapsed(x, operands[i].shape) for x, i in zip(results, self.like, strict=True)
        )


@contextmanager
def compiled_kernels(wanted: bool = True) -> Iterator[None]:
    """Use compiled kernels inside the context, if they are wanted and torch can compile here."""
    before, Kernel.wanted = Kernel.wanted, wanted
    try:
        yield
    finally:
        Kernel.wanted = before


def _small(x: Tensor) -> bool:
    return x.is_meta or (x.device.type == "cpu" and x.numel() < LARGE)


def collapsed(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Merge the last axes along which every smaller operand has size 1, so that fewer shapes are compiled.

    Args:
        x: any shape.
        *others: broadcastable to x.

    >>> [tuple(t.shape) for t in collapsed(torch.ones(2, 3, 4, 5), torch.ones(2, 3, 1, 1), torch.ones(2, 3, 4, 5))]
    [(2, 3, 20), (2, 3, 1), (2, 3, 20)]
    """
    small = [o for o in others if o.ndim and o.shape != x.shape]
    if x.ndim < 3 or any(o.ndim != x.ndim for o in small) or not all(t.is_contiguous() for t in (x, *others)):
        return x, *others
    first = x.ndim
    while first > 1 and all(o.shape[first - 1] == 1 for o in small):
        first -= 1
    if x.ndim - first < 2:
        return x, *others
    return tuple(t.flatten(first) if t.ndim else t for t in (x, *others))


def _uncollapsed(result: Tensor, shape: torch.Size) -> Tensor:
    """The result for collapsed operands in the original shape; not a view, so it may be written to."""
    whole: Tensor = result if result.shape == shape else torch.ops.aten._unsafe_view(result, shape)
    return whole
