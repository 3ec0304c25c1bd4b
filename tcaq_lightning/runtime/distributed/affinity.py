"""Which cores of its node a process computes on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tcaq_lightning.runtime.distributed.collectives import gather, rank

TOPOLOGY = Path("/sys/devices/system/cpu")
THREADS = Path("/proc/self/task")
"""Linux' directories of the logical cores, and of this process' threads."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""What tells one running system from another, whatever they are called."""


def available_cores() -> list[int]:
    """Logical cores that this process may use; threads of one core, and cores of one package, are neighbours."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0), key=lambda core: (*_position(core), core))


def _position(core: int) -> tuple[int, int]:
    """Package of a logical core, and the first of its core's threads; zeros where the system does not tell."""
    directory = TOPOLOGY / f"cpu{core}" / "topology"
    try:
        package = int((directory / "physical_package_id").read_text())
        siblings = (directory / "thread_siblings_list").read_text()  # such as 0,4 or 0-1
        return package, int(siblings.replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return 0, 0


def _system() -> str:
    try:
        return BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def own_cores() -> list[int] | None:
    """This rank's part of the cores that it and other ranks may use; None if there are fewer cores than those ranks.

    Where whatever started the ranks has given each cores of its own, as SLURM may, those are its part. All ranks must
    call this.
    """
    mine = _system(), available_cores()
    cores = mine[1]
    sharers = [number for number, other in enumerate(gather(mine)) if other == mine]
    if len(cores) < len(sharers):
        return None
    position = sharers.index(rank())
    begin, end = (len(cores) * number // len(sharers) for number in (position, position + 1))
    return cores[begin:end]


@contextmanager
def held_to(cores: Sequence[int]) -> Iterator[None]:
    """Keep all threads of this process, new ones included, on the given cores, where the system supports it.

    Ranks wait for each other at each step: a rank that moves to another rank's core, or has to refill the caches of
    another core, slows all of them down.
    """
    if not hasattr(os, "sched_setaffinity") or not THREADS.is_dir():
        yield
        return
    before = os.sched_getaffinity(0)
    _move_threads(cores)
    try:
        yield
    finally:
        _move_threads(before)


def _move_threads(cores: Sequence[int] | set[int]) -> None:
    for task in THREADS.iterdir():
        with suppress(OSError):  # it has ended, or may not be moved
            os.sched_setaffinity(int(task.name), cores)
