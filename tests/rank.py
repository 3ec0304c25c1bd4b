"""One of two ranks that try the collectives on each other; exits with 0 if all is as it should be.

python rank.py RANK FILE: a new file that both find each other by.
"""

from __future__ import annotations

import sys
import time

import pytest
import torch
import torch.distributed as dist

from tcaq_lightning.errors import UserError
from tcaq_lightning.quantizers.observers import LogHistogram, RangeStatistics
from tcaq_lightning.runtime.distributed import collectives as distributed
from tcaq_lightning.runtime.distributed.shared_memory import SLOT, MemoryFile


def broadcasts(rank: int) -> None:
    value = {"x": torch.arange(3) + rank, "nested": [torch.full((2, 2), 0.5), (None, "text")], "rank": rank}
    for source in (0, 1):
        got = distributed.broadcast(value, source)
        assert torch.equal(got["x"], torch.arange(3) + source)
        assert torch.equal(got["nested"][0], torch.full((2, 2), 0.5))
        assert got["nested"][1] == (None, "text")
        assert got["rank"] == source
    rows = distributed.gather(torch.full((rank + 1, 2), float(rank)) if rank else None)
    assert rows[0] is None
    assert torch.equal(rows[1], torch.ones(2, 2))


def rank_zero_decides(rank: int) -> None:
    assert distributed.on_main(lambda: f"from {rank}") == "from 0"

    def fail() -> None:
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        distributed.on_main(fail)


def shares(rank: int) -> None:
    assert list(distributed.share(range(5))) == [[0, 1], [2, 3, 4]][rank]
    assert [distributed.is_mine(i) for i in range(3)] == [[True, False, True], [False, True, False]][rank]


def reductions_equal_one_process(rank: int) -> None:
    """Over all samples, whichever rank has seen them, and however many each has."""
    generator = torch.Generator().manual_seed(0)
    x, groups = torch.rand(9, 4, 3, generator=generator), torch.arange(9) % 2
    mine = slice(0, 2) if rank == 0 else slice(2, 9)
    one, two = RangeStatistics(3, 4), RangeStatistics(3, 4)  # nothing is in the last group
    one.update(x, groups, channel_dim=1)
    two.update(x[mine], groups[mine], channel_dim=1)
    two.reduce()
    assert torch.equal(one.low, two.low)
    assert torch.equal(one.high, two.high)
    whole, part = LogHistogram(3), LogHistogram(3)
    whole.update(x, groups)
    part.update(x[mine], groups[mine])
    part.reduce()
    assert torch.equal(whole.counts, part.counts)
    sums = distributed.total(x[mine].double().sum(0))
    torch.testing.assert_close(sums, x.double().sum(0))
    assert all(torch.equal(s, sums) for s in distributed.gather(sums))


def gradients(rank: int) -> None:
    first, second = torch.full((2, 3), float(rank)), torch.tensor(3.0 * rank)
    calls = 0
    reduce = dist.all_reduce

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    dist.all_reduce = counting
    moments = []
    rows = distributed.average_and_gather(
        [first, second], torch.tensor([[rank + 0.1, -1.0]]), lambda: moments.append(calls)
    )
    assert calls == 1
    assert moments == [1]  # once, when the exchange has begun
    assert torch.equal(first, torch.full((2, 3), 0.5))
    assert second == 1.5
    assert torch.equal(rows, torch.tensor([[0.1, -1.0], [1.1, -1.0]]))


def sums_in_shared_memory(rank: int) -> None:
    """The same as through the process group, of tensors smaller and larger than what is exchanged at once."""
    sizes = [1, 5, SLOT // 4 - 8, SLOT // 2 + 3, 3, SLOT]
    generator = torch.Generator().manual_seed(rank)
    summands = [torch.randn(size, generator=generator) for size in sizes]
    rows = torch.tensor([[rank + 0.1, -1.0]])
    expected = [x.clone() for x in summands]
    for x in expected:
        gathered = distributed.average_and_gather([x], rows)
    done = []
    reduce, dist.all_reduce = dist.all_reduce, None
    with distributed.memory_shared(60.0):
        for x, mean in zip(summands, expected, strict=True):
            if rank == x.numel() % 2:
                time.sleep(0.15)  # longer than the other one stays awake
            assert torch.equal(distributed.average_and_gather([x], rows, lambda: done.append(True)), gathered)
            assert torch.equal(x, mean)
    dist.all_reduce = reduce
    assert len(done) == len(sizes)
    gradients(rank)


def memory_that_one_rank_cannot_reach(rank: int) -> None:
    opened, MemoryFile.open = MemoryFile.open, lambda _: (_ for _ in ()).throw(FileNotFoundError())
    with distributed.memory_shared(60.0):
        gradients(rank)
    MemoryFile.open = opened


def main() -> None:
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    checks = (broadcasts, rank_zero_decides, shares, reductions_equal_one_process, gradients)
    for check in (*checks, sums_in_shared_memory, memory_that_one_rank_cannot_reach):
        check(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
