from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tcaq_lightning.calibration.early_stop import EarlyStop, rounded_hard
from tcaq_lightning.config import TrainerConfig
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.quantizers import Rounding
from tcaq_lightning.runtime.files import read_checkpoint
from tcaq_lightning.runtime.lightning import UnitCheckpoint, make_trainer


class Line(pl.LightningModule):
    """A parameter that falls by one a step."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(()))

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(40), batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, _: int) -> Tensor:
        return self.x


def run(errors: list[float], patience: int, *callbacks: pl.Callback, resume: Any = None) -> int:
    """Steps that a phase of 40 takes when the looks at steps 4, 8, … find these errors."""
    found: Iterator[float] = iter(errors)
    stop = EarlyStop(lambda: next(found), 40, patience, checks=10)
    trainer = make_trainer(TrainerConfig(accelerator="cpu"), [stop, *callbacks], None, 40)
    trainer.fit(Line(), ckpt_path=resume, weights_only=True)
    return trainer.global_step


@pytest.mark.parametrize(
    ("errors", "patience", "steps"),
    [
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], 1, 40),
        ([9, 8, 8], 1, 12),
        ([9, 8, 9, 7, 8, 7], 2, 24),
        ([9, float("nan")], 1, 8),
    ],
)
def test_it_stops_after_so_many_looks_without_a_fall(errors: list[float], patience: int, steps: int) -> None:
    assert run(errors, patience) == steps


def test_what_it_has_seen_is_in_the_checkpoint_but_none_is_written_at_the_end(tmp_path: Any) -> None:
    path = tmp_path / "unit.ckpt"
    errors = [9.0, 8.0, 8.5, 7.5, 7.6, 7.7]
    assert run(errors, 2, UnitCheckpoint(path, 12, {"unit": "conv_in"})) == 24
    assert read_checkpoint(path)["place"] == {"unit": "conv_in"}
    assert read_checkpoint(path)["global_step"] == 12  # not the last one, at which it stopped
    assert run(errors[3:], 2, resume=path) == 24
    assert run([9.0], 2, resume=path) == 16  # the rise before the checkpoint counts


def test_rounded_hard_is_what_the_weights_would_end_as(make_twins: Any, initialized: Any) -> None:
    unit, _, _ = initialized(make_twins(samples=16), "mid_block.resnets.0")
    layers = quant_layers(unit).values()
    for layer in layers:
        layer.learned_weight.begin_learning(Rounding.SOFT, layer.input_quantizer.r)
        with torch.no_grad():
            layer.learned_weight.v.add_(torch.randn_like(layer.learned_weight.v))
    soft = [layer.weight_quantizer(layer.input_quantizer.r).detach().clone() for layer in layers]
    with rounded_hard(unit):
        hard = [layer.weight_quantizer(layer.input_quantizer.r).detach().clone() for layer in layers]
    assert all(layer.learned_weight.rounding is Rounding.SOFT for layer in layers)
    for layer, before, during in zip(layers, soft, hard, strict=True):
        assert torch.equal(layer.weight_quantizer(layer.input_quantizer.r), before)
        layer.learned_weight.end_learning()
        assert torch.equal(layer.weight_quantizer(layer.input_quantizer.r), during)
        assert not torch.equal(before, during)
