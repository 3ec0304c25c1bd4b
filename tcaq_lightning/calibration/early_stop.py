"""Stopping a fit whose held-out error no longer falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from torch import nn

from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.quantizers import Rounding


class EarlyStop(pl.Callback):
    """Stop a fit when the held-out error has not fallen for several checks of it.

    Args:
        error: the unit's present held-out error, the same on every rank.
        iterations: optimisation steps of the whole phase.
        patience: checks without a lower error after which the fit stops.
        checks: number of checks in a whole phase.
    """

    def __init__(self, error: Callable[[], float], iterations: int, patience: int, checks: int) -> None:
        self.error = error
        self.every = max(1, iterations // checks)
        self.patience = patience
        self.best = math.inf
        self.waited = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Check the error, when it is time."""
        if trainer.global_step % self.every:
            return
        error = self.error()
        self.waited = 0 if error < self.best else self.waited + 1
        self.best = min(error, self.best)
        if self.waited >= self.patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """For the fit's checkpoint."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best, self.waited = state_dict["best"], state_dict["waited"]


@contextmanager
def rounded_hard(unit: nn.Module) -> Iterator[None]:
    """Round the weights of a unit that learns its rounding as they would be if it ended now."""
    soft = [w for layer in quant_layers(unit).values() if (w := layer.learned_weight).rounding is Rounding.SOFT]
    for weight in soft:
        weight.rounding = Rounding.HARD
    try:
        yield
    finally:
        for weight in soft:
            weight.rounding = Rounding.SOFT
