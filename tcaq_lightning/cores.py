"""Which cores of its node a process computes on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tcaq_lightning.distributed import gather
from tcaq_lightning.environment import Place

TOPOLOGY = Path("/sys/devices/system/cpu")
THREADS = Path("/proc/self/task")
"""Linux' directories of the logical cores, and of this process' threads."""


def available_cores() -> list[int]:
    """Logical cores that this process may use; threads of one core, and cores of one package, are neighbours."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0), key=lambda core: (*_position(core), core))


def _position(core: int) -> tuple[int, int]:
    """Package and physical core of a logical core, zeros where the system does not tell."""
    directory = TOPOLOGY / f"cpu{core}" / "topology"
    try:
        return int((directory / "physical_package_id").read_text()), int((directory / "core_id").read_text())
    except (OSError, ValueError):
        return 0, 0


def own_cores(place: Place) -> list[int]:
    """This rank's cores: its part of those that all ranks of its node may use.

    Where whatever started the ranks has given each its own already, as SLURM may, they keep them, and so they do
    where there are more ranks than cores. All ranks must call this.
    """
    mine = available_cores()
    first = place.rank - place.local_rank
    neighbours = gather(mine)[first : first + place.devices]
    if any(cores != mine for cores in neighbours) or len(mine) < place.devices:
        return mine
    begin, end = (len(mine) * number // place.devices for number in (place.local_rank, place.local_rank + 1))
    return mine[begin:end]


@contextmanager
def held_to(cores: Sequence[int]) -> Iterator[None]:
    """Keep all threads of this process, and those that begin meanwhile, on the given cores, where the system can.

    Ranks wait for each other at each step: one that is moved to another's core, or has to fill another core's caches
    again, holds up all.
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
