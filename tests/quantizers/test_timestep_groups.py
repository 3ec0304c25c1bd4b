from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.errors import UserError
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, group_boundaries


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


def test_every_thread_has_groups_of_its_own() -> None:
    groups, seen = TimestepGroups([500.0]), []
    groups.set(torch.tensor([1, 0]))

    def look() -> None:
        with pytest.raises(UserError, match="2 timestep groups"):
            groups.of_rows(2)
        groups.set(torch.tensor([0]), 0)
        seen.append(groups.running)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen[0].single == 0
    assert groups.current.tolist() == [1, 0]
    assert groups.single is None


def test_one_group_need_not_be_said() -> None:
    groups = TimestepGroups([])
    assert groups.of_rows(3).tolist() == [0]
    assert groups.single == 0


def test_a_copy_passes_nothing_through() -> None:
    groups = TimestepGroups([500.0])
    groups.set(torch.tensor([1]))
    for other in (copy.copy(groups), copy.deepcopy(groups)):
        assert other.boundaries == [500.0]
        with pytest.raises(UserError, match="timestep"):
            _ = other.running
