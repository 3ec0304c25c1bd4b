"""Hooks on the inputs of quantizers during an observation pass."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tcaq_lightning.calibration.observation import UnitObservation
from tcaq_lightning.nn.parts import quantizers


class QuantizerInputs(pl.Callback):
    """Base of callbacks that see every input of a unit's quantizers of one class while it is observed."""

    kind: type[nn.Module]

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def receive(self, observation: UnitObservation, name: str, quantizer: nn.Module, x: Tensor) -> None:
        """Take in one batch `x` (B, ...) of the quantizer called `name`."""
        raise NotImplementedError

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the quantizers."""
        assert isinstance(pl_module, UnitObservation)
        for name, module in quantizers(pl_module.unit).items():
            if isinstance(module, self.kind):
                self._handles.append(module.register_forward_pre_hook(self._hook(pl_module, name)))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, observation: UnitObservation, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: self.receive(observation, name, module, args[0])
