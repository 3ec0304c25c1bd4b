from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.entry_steps import EntrySteps
from tcaq_lightning.quantizers import ActivationQuantizer
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


class Unit(nn.Module):
    """Two quantizers in a row, with a learned weight in between, and one that reads the unit's second input."""

    def __init__(self) -> None:
        super().__init__()
        groups = TimestepGroups([])
        groups.set(torch.zeros(3, dtype=torch.long))
        self.first, self.second, self.side = (ActivationQuantizer(4, groups, channels=2) for _ in range(3))
        self.weight = nn.Parameter(torch.ones(2))
        for quantizer in (self.first, self.second, self.side):
            quantizer.begin_learning(reparameterize=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.second(self.first(x) * self.weight) + self.side(y)

    def learned(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.grad is not None}


ENTRY = {"first.log_delta", "first.log_r", "side.log_delta", "side.log_r"}
REST = {"second.log_delta", "second.log_r", "weight"}


def learned_by_step(steps: list[int], every: int) -> list[set[str]]:
    torch.manual_seed(0)
    unit, found = Unit(), []
    entry = EntrySteps(unit, every)
    for step in steps:
        unit.zero_grad()
        with entry.forward(step):
            output = unit(torch.randn(3, 2), torch.randn(3, 2))
        output.sum().backward()
        entry.after_backward(step)
        found.append(unit.learned())
    return found


@pytest.mark.parametrize("start", range(4))
def test_what_reads_the_units_inputs_is_learned_at_some_steps_wherever_a_fit_begins(start: int) -> None:
    steps = list(range(start, start + 8))
    assert learned_by_step(steps, 3) == [REST | ENTRY if step % 3 == 0 else REST for step in steps]


def test_or_at_every_step() -> None:
    assert learned_by_step([0, 1, 2], 1) == [REST | ENTRY] * 3


def test_what_is_not_learned_at_all_stays_so() -> None:
    unit = Unit()
    unit.first.log_r.requires_grad_(False)
    entry = EntrySteps(unit, 2)
    for step in (1, 2):
        with entry.forward(step):
            unit(torch.randn(3, 2), torch.randn(3, 2))
    assert not unit.first.log_r.requires_grad
    assert unit.first.log_delta.requires_grad


def test_where_nothing_else_is_learned_it_is_at_every_step() -> None:
    unit = Unit()
    unit.weight.requires_grad_(False)
    for parameter in unit.second.parameters():
        parameter.requires_grad_(False)
    entry = EntrySteps(unit, 4)
    for step in (1, 2, 3):
        unit.zero_grad()
        with entry.forward(step):
            output = unit(torch.randn(3, 2), torch.randn(3, 2))
        output.sum().backward()
        entry.after_backward(step)
        assert unit.learned() == ENTRY
