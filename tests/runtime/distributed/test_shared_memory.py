from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tcaq_lightning.runtime.distributed import shared_memory
from tcaq_lightning.runtime.distributed.shared_memory import SLOT, MemoryFile, SharedSums, make_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux' own")

HOLD = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, 1)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def short_of_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "AWAKE", 0.01)


@contextmanager
def another_rank(file: MemoryFile) -> Iterator[subprocess.Popen[str]]:
    """A process that is rank 1, and never writes anything."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, file.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(10)


def make_sums(timeout: float = 30.0) -> tuple[SharedSums, MemoryFile]:
    descriptor, file = make_file(SharedSums.size(2))
    return SharedSums(descriptor, 0, 2, timeout), file


def test_three_ranks_add_up_in_rank_order() -> None:
    sizes = (1, 5, SLOT // 4 + 7)
    descriptor, _ = make_file(SharedSums.size(3))
    processes = multiprocessing.get_context("fork")
    present, answers = processes.Barrier(3), processes.SimpleQueue()

    def summand(rank: int, size: int) -> torch.Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(rank))

    def work(rank: int) -> None:
        torch.set_num_threads(1)  # a pool of threads does not live on in a forked process
        sums = SharedSums(descriptor, rank, 3, 30.0)
        present.wait()
        equal = []
        for size in sizes:
            x = summand(rank, size)
            sums.add_up(x)
            equal.append(torch.equal(x, summand(0, size) + summand(1, size) + summand(2, size)))
        answers.put(equal)

    ranks = [processes.Process(target=work, args=(rank,)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    assert [answers.get() for _ in ranks] == [[True] * len(sizes)] * 3
    os.close(descriptor)


def test_other_work_is_done_once_and_a_rank_that_never_was_there_is_gone() -> None:
    sums, _ = make_sums()
    done = []
    with pytest.raises(dist.DistNetworkError, match="rank 1 is gone"):
        sums.add_up(torch.ones(3), lambda: done.append(True))
    assert done == [True]
    sums.close()


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_a_rank_that_ends_is_noticed_at_once(how: str) -> None:
    sums, file = make_sums()
    with another_rank(file) as process:

        def end() -> None:
            if how == "killed":
                process.kill()  # and nobody has waited for it: it still has a process number
            else:
                assert process.stdin is not None
                process.stdin.close()

        started = time.monotonic()
        with pytest.raises(dist.DistNetworkError, match="rank 1 is gone"):
            sums.add_up(torch.ones(3), end)
        assert time.monotonic() - started < 10
    sums.close()


def test_a_rank_that_does_not_come_is_waited_for_until_the_timeout() -> None:
    sums, file = make_sums(timeout=0.3)
    with another_rank(file):
        started = time.monotonic()
        with pytest.raises(dist.DistNetworkError, match="rank 1 did not come within"):
            sums.add_up(torch.ones(3))
        assert time.monotonic() - started >= 0.3
    sums.close()


def test_files_have_no_name_and_are_known_by_their_identity() -> None:
    sums, file = make_sums()
    assert "deleted" in str(Path(file.path).readlink())
    with pytest.raises(FileNotFoundError, match="another file"):
        replace(file, identity=(0, 0)).open()
    sums.close()
    with pytest.raises(FileNotFoundError):
        file.open()


def test_systems_without_memory_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.memfd_create")
    with pytest.raises(OSError, match="no files in memory"):
        make_file(1)
