"""How this process asks the system for memory, and how much there is."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LIMIT = 1 << 30

_CONTROL_GROUPS = [
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
]
"""Limit and use of this process' control group, versions 2 and 1."""


def reuse_freed_memory() -> None:
    """Let the C library keep freed activations for the next step.

    glibc maps every large block anew and unmaps it when it is freed, so that each step faults all its pages in again:
    about a fifth of a step's time on a CPU. Other C libraries are left alone.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LIMIT)
        mallopt(_M_TRIM_THRESHOLD, _LIMIT)


def release_freed_memory() -> None:
    """Give what this process has freed back to the system, where its C library keeps it (`reuse_freed_memory`)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def available_memory() -> float:
    """Bytes that this process may still take: what the system has available, within the limit of its control group."""
    available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            available = float(line.split()[1]) * 1024
    for limit, used in _CONTROL_GROUPS:
        values = [next(iter(_lines(path)), "") for path in (limit, used)]
        if all(value.isdecimal() for value in values):
            available = min(available, max(0.0, float(values[0]) - float(values[1])))
    return available


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
