from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, TimestepHook, group_boundaries


@given(st.lists(st.integers(0, 999), min_size=1, max_size=40), st.data())
def test_groups_share_the_grid_evenly(timesteps: list[int], data: st.DataObject) -> None:
    grid = sorted(set(timesteps))
    count = data.draw(st.integers(1, len(grid)))
    boundaries = group_boundaries(timesteps, count)
    assert boundaries == sorted(set(boundaries))
    groups = TimestepGroups(boundaries).of(torch.tensor(grid))
    sizes = torch.bincount(groups, minlength=count)
    assert len(sizes) == count
    assert sizes.max() - sizes.min() <= 1
    assert groups.tolist() == sorted(groups.tolist())


def test_more_groups_than_timesteps_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="timestep_groups"):
        group_boundaries([1, 2, 2], 3)


@pytest.mark.parametrize("sampler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler])
@pytest.mark.parametrize("steps", [7, 33])
def test_any_samplers_timestep_finds_the_interval_it_is_in(sampler: Any, steps: int) -> None:
    groups = TimestepGroups(group_boundaries(range(0, 1000, 50), 5))
    scheduler = sampler()
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        g = int(groups.of(t.reshape(1)))
        assert g == sum(t.item() >= b for b in groups.boundaries)


class Probe(nn.Module):
    def __init__(self, groups: TimestepGroups) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> tuple[list[int], int | None]:
        return self.groups.current.tolist(), self.groups.single


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize(
    ("timestep", "expected", "single"),
    [
        (700, [1, 1, 1], 1),
        (12.5, [0, 0, 0], 0),
        (torch.tensor(700), [1, 1, 1], 1),
        (torch.tensor([700]), [1, 1, 1], 1),
        (torch.tensor([700, 0, 500]), [1, 0, 1], None),
        (torch.tensor([499.9, 0.0, 500.0]), [0, 0, 1], None),
    ],
)
def test_hook_understands_every_form(keyword: bool, timestep: Any, expected: list[int], single: int | None) -> None:
    groups = TimestepGroups([500.0])
    probe = Probe(groups)
    probe.register_forward_pre_hook(TimestepHook(groups), with_kwargs=True)
    x = torch.zeros(3, 1, 2, 2)
    got = probe(sample=x, timestep=timestep) if keyword else probe(x, timestep, return_dict=False)
    assert got == (expected, single)
    assert (probe(x, timestep=timestep) if keyword else probe(x, timestep)) == (expected, single)


def test_using_puts_the_groups_back_even_after_an_error() -> None:
    groups = TimestepGroups([500.0])
    groups.set(torch.tensor([1, 1]), single=1)

    def fail() -> None:
        with groups.using(torch.tensor([0])):
            assert groups.single is None
            assert groups.current.tolist() == [0]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert groups.current.tolist() == [1, 1]
    assert groups.single == 1


def test_a_copied_denoiser_has_groups_of_its_own(make_twins: Any) -> None:
    twins = make_twins(attention=False)
    other = copy.deepcopy(twins.quantized)
    twins.timestep_groups.set(torch.tensor([0]))
    other(twins.x, 900)
    assert twins.timestep_groups.current.tolist() == [0]
    assert other.conv_in.input_quantizer.groups.single == 1


class Transformer(nn.Module):
    """Takes its timestep third, as transformers with a context do."""

    def __init__(self, groups: TimestepGroups) -> None:
        super().__init__()
        self.groups = groups
        self.register_forward_pre_hook(TimestepHook(groups), with_kwargs=True)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Any:
        return self.groups.current.tolist()


def test_hook_finds_the_timestep_wherever_a_denoiser_takes_it() -> None:
    x, t = torch.zeros(3, 4, 2), torch.tensor([700.0, 0.0, 500.0])
    model = Transformer(TimestepGroups([450.0]))
    assert model(x, x, t) == model(x, encoder_hidden_states=x, timestep=t) == [1, 0, 1]
    assert model(hidden_states=x, encoder_hidden_states=x, timestep=t) == [1, 0, 1]


@pytest.mark.parametrize(
    ("rows", "expected"), [(2, [0, 1]), (6, [0, 0, 0, 1, 1, 1]), (1, [0, 1])]
)  # a single row is everybody's
def test_several_rows_of_a_sample_are_in_its_group(rows: int, expected: list[int]) -> None:
    groups = TimestepGroups([500.0])
    groups.set(torch.tensor([0, 1]))
    assert groups.of_rows(rows).tolist() == expected
    with pytest.raises(ValueError, match="multiple of the 2 samples"):
        groups.of_rows(5)
    groups.set(torch.tensor([1]))
    assert groups.of_rows(5).tolist() == [1]
