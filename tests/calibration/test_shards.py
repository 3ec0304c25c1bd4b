from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten

from tcaq_lightning.calibration.shards import Shard
from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.runtime.distributed import collectives


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))
def test_ranks_share_all_samples_evenly(ranks: int, steps: int, more: int, more_held_out: int) -> None:
    learned, held_out = ranks + more, ranks + more_held_out
    shards = []
    for rank in range(ranks):
        with _as_rank(rank, ranks):
            shards.append(Shard.deal(torch.arange(steps), learned, held_out))
    everything = torch.cat([s.owned for s in shards])
    assert sorted(everything.tolist()) == list(range(steps * (learned + held_out)))
    for kind in ("train", "held_out"):
        numbers = getattr(shards[0], kind)
        held = [s.here(numbers) for s in shards]
        sizes = [len(h) for h in held]
        assert sum(sizes) == len(numbers)
        assert max(sizes) - min(sizes) <= steps
        assert min(sizes) >= steps
        found = torch.cat([s.owned[h] for s, h in zip(shards, held, strict=True)])
        assert sorted(found.tolist()) == numbers.tolist()
    assert torch.equal(
        shards[0].groups[shards[0].owned],
        shards[0].groups.unflatten(0, (steps, -1))[:, shards[0].trajectories].flatten(),
    )


def test_one_rank_holds_everything_in_order() -> None:
    shard = Shard.deal(torch.tensor([1, 1, 0]), learned=3, held_out=2)
    numbers = torch.tensor([7, 0, 14, 3])
    assert torch.equal(shard.here(numbers), numbers)
    assert shard.groups.tolist() == [1] * 10 + [0] * 5
    x = torch.randn(15, 2)
    data = UnitData([x], {}, tree_flatten(((x,), {}))[1], -x, shard.groups)
    collected = shard.collected(data, numbers)
    assert torch.equal(collected.inputs[0], x[numbers])
    assert torch.equal(collected.targets, -x[numbers])
    assert torch.equal(collected.groups, shard.groups[numbers])


class _as_rank:  # noqa: N801 - reads as a statement
    """Pretend to be one of several ranks, for what needs no communication."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.values = {"rank": lambda: rank, "world_size": lambda: ranks}

    def __enter__(self) -> None:
        self.before = {name: getattr(collectives, name) for name in self.values}
        for name, value in self.values.items():
            setattr(collectives, name, value)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            setattr(collectives, name, value)
