"""Learn the quantizers of a unit's own inputs at some optimisation steps only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from tcaq_lightning.nn.parts import quantizers


class EntrySteps:
    """Parameters of those quantizers in a unit whose input needs no gradient.

    Their own gradient takes the backward pass through the first layers, up to a fifth of a step, for a few numbers.
    They are learned, with a gradient, at every `every`-th step, and are constants at the others. If nothing else is
    learned, they are learned at every step.

    Args:
        unit: quantized unit, learning.
        every: number of steps.
    """

    def __init__(self, unit: nn.Module, every: int) -> None:
        self.unit, self.every = unit, every
        self.parameters: list[nn.Parameter] | None = None

    def learned(self, step: int) -> bool:
        """Whether they are learned at a step."""
        return step % self.every == 0

    @contextmanager
    def forward(self, step: int) -> Iterator[None]:
        """Around the forward pass of a step; the first one finds out which they are."""
        if self.every == 1:
            yield
        elif self.parameters is None:
            with self._watched():
                yield
        else:
            for parameter in self.parameters:
                parameter.requires_grad_(self.learned(step))
            yield

    def after_backward(self, step: int) -> None:
        """Drop the gradients of a first step at which they are not learned, so a resumed fit gives the same bits."""
        if not self.learned(step):
            for parameter in self.parameters or ():
                parameter.grad = None

    @contextmanager
    def _watched(self) -> Iterator[None]:
        needs_gradient: dict[str, bool] = {}

        def see(_: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
            needs = any(isinstance(x, Tensor) and x.requires_grad for x in args)
            needs_gradient[name] = needs or needs_gradient.get(name, False)

        found = quantizers(self.unit)
        hooks = [q.register_forward_pre_hook(partial(see, name=name)) for name, q in found.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        entry = [found[name] for name, needs in needs_gradient.items() if not needs]
        self.parameters = [p for q in entry for p in q.parameters(recurse=False) if p.requires_grad]
        if len(self.parameters) == sum(p.requires_grad for p in self.unit.parameters()):
            self.every = 1
