"""Sums over the ranks of one node, in memory that all of them map.

Between processes on a node a process group sends its bytes through sockets, by threads that first have to be woken on
cores that compute: of a step on a small unit that takes a tenth. Here each rank writes its summand, says so, and reads
those of the others as soon as they have said so.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

AWAKE = 0.1
"""Seconds for which a rank waits without sleeping: one that comes later has more than a step to do."""
NAP = 0.001
"""Seconds that it sleeps then between two looks at the others."""
SLOT = 1 << 22
"""Bytes that a rank writes at once; larger tensors are added up part by part."""
LINE = 64
"""Bytes from one rank's counter to the next one's: each has a cache line to itself."""


@dataclass(frozen=True)
class MemoryFile:
    """Where other processes of this system find a memory file.

    Attributes:
        path: opens it, as long as the process that made it has it open.
        identity: device and inode.
    """

    path: str
    identity: tuple[int, int]

    def open(self) -> int:
        """A descriptor.

        Raises:
            OSError: it is not there, such as for a process that sees other processes.
        """
        found = Path(self.path).stat()
        if (found.st_dev, found.st_ino) != self.identity:
            raise FileNotFoundError(f"{self.path} is another file")
        return os.open(self.path, os.O_RDWR)


def make_file(nbytes: int) -> tuple[int, MemoryFile]:
    """A file in memory, which has no name and vanishes with the processes that have opened it, and its descriptor.

    Raises:
        OSError: the system has no such files, or no memory.
    """
    if not all(hasattr(os, name) for name in ("memfd_create", "posix_fallocate", "sched_yield")):
        raise OSError("no files in memory on this system")
    descriptor = os.memfd_create("sums")
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError:
        os.close(descriptor)
        raise
    found = os.fstat(descriptor)
    return descriptor, MemoryFile(f"/proc/{os.getpid()}/fd/{descriptor}", (found.st_dev, found.st_ino))


class SharedSums:
    """One rank's end of the memory. All ranks must have theirs before the first of them adds up.

    Each rank holds a lock on a byte of the file, which the system lifts when the process ends, however it does, and
    when it closes any descriptor of the file.

    Args:
        descriptor: of the file, of `SharedSums.size(ranks)` bytes, zeros at first; closed with this.
        rank: number of this process.
        ranks: how many there are.
        timeout: seconds after which waiting for another rank is an error.
    """

    def __init__(self, descriptor: int, rank: int, ranks: int, timeout: float) -> None:
        import fcntl  # not on every system

        self._fcntl = fcntl
        self.descriptor, self.rank, self.timeout = descriptor, rank, timeout
        self._others = [other for other in range(ranks) if other != rank]
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        memory = mmap.mmap(descriptor, self.size(ranks))
        self._counters = memoryview(memory)[: self._header(ranks)].cast("q")
        slots = torch.frombuffer(memory, dtype=torch.uint8, offset=self._header(ranks))
        self._slots = slots.view(2, ranks, SLOT)  # a rank may write to one half while another still reads the other
        self._written = 0

    @staticmethod
    def _header(ranks: int) -> int:
        return -(-LINE * ranks // mmap.PAGESIZE) * mmap.PAGESIZE

    @classmethod
    def size(cls, ranks: int) -> int:
        """Bytes of the file."""
        return cls._header(ranks) + 2 * ranks * SLOT

    def add_up(self, x: Tensor, meanwhile: Callable[[], None] | None = None) -> None:
        """Replace a contiguous CPU tensor, of one shape on all ranks, by the ranks' sum, added up in rank order.

        Args:
            x: the summand.
            meanwhile: other work for the time until the other ranks have come.

        Raises:
            DistNetworkError: another rank has ended, or did not come in time.
        """
        for part in torch.split(x.view(-1), SLOT // x.itemsize):
            slots = self._slots[self._written % 2, :, : part.nbytes].view(x.dtype)
            slots[self.rank] = part
            os.sched_yield()  # Linux' scheduler has the writes before it seen before those after it, on any processor
            self._written += 1
            self._counters[self.rank * (LINE // 8)] = self._written
            if meanwhile is not None:
                meanwhile()
                meanwhile = None
            self._wait()
            torch.add(slots[0], slots[1], out=part)
            for summand in slots[2:]:
                part += summand

    def _late(self) -> list[int]:
        return [other for other in self._others if self._counters[other * (LINE // 8)] < self._written]

    def _wait(self) -> None:
        """Until all ranks have written their part."""
        started = time.monotonic()
        while late := self._late():
            waited = time.monotonic() - started
            if waited < AWAKE:
                os.sched_yield()  # threads that could use the core, such as one that reads files, go first
                continue
            gone = [other for other in late if self._has_ended(other)]
            if set(gone).intersection(self._late()):  # it may have written before it ended
                raise dist.DistNetworkError(f"rank {gone[0]} is gone")
            if waited > self.timeout:
                raise dist.DistNetworkError(f"rank {late[0]} did not come within {self.timeout:.0f} s")
            time.sleep(NAP)
        os.sched_yield()  # as above: what the others have written before they said so is seen from here on

    def _has_ended(self, other: int) -> bool:
        lock = self._fcntl
        try:
            lock.lockf(self.descriptor, lock.LOCK_SH | lock.LOCK_NB, 1, other)
        except OSError:
            return False
        lock.lockf(self.descriptor, lock.LOCK_UN, 1, other)
        return True

    def close(self) -> None:
        """Lift this rank's lock: whoever waits for it need not wait any more."""
        os.close(self.descriptor)
