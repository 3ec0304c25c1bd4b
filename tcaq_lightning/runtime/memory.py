"""How this process gets memory from the system, and how much is available."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tcaq_lightning.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL, _LARGE = 1 << 20, 1 << 30

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")

_kept = [_LARGE]
"""Up to which size this process' C library keeps freed blocks now."""

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
    _keep_blocks_up_to(_LARGE)


@contextmanager
def freed_memory_reused(reuse: bool) -> Iterator[None]:
    """Inside the context, reuse freed memory or return it to the system at once; afterwards the former setting holds.

    A loop over blocks of equal sizes is faster when it reuses them. Work on blocks of many sizes leaves holes between
    those that are still in use, and takes up to twice the memory.
    """
    before = _kept[-1]
    _keep_blocks_up_to(_LARGE if reuse else _SMALL)
    release_freed_memory()
    try:
        yield
    finally:
        _keep_blocks_up_to(before)
        release_freed_memory()


def _keep_blocks_up_to(nbytes: int) -> None:
    _kept[-1] = nbytes
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, nbytes)
        mallopt(_M_TRIM_THRESHOLD, nbytes)


def release_freed_memory() -> None:
    """Return freed memory to the system, if the C library has kept it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, of a GPU or of the host.

    >>> is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    True
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; to import it takes long
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def out_of_memory_message(error: BaseException, where: str = "") -> str:
    """The line that tells the user that memory is exhausted.

    Args:
        error: as `is_out_of_memory` takes it.
        where: what was done, such as `unit mid_block`.
    """
    detail = " ".join(str(error).split("\n")[0].split())[:150]
    return (
        f"out of memory{f' in {where}' if where else ''} ({detail or type(error).__name__}); lower reconstruction."
        "batch_size, calibration.batch_size, evaluation.batch_size or calibration.memory_budget, or the number of "
        "images at a time; the same command goes on from there"
    )


@contextmanager
def out_of_memory_in(where: str) -> Iterator[None]:
    """Say in one line what memory was used up by.

    Args:
        where: what is done within, such as `unit mid_block`.

    Raises:
        UserError: memory is used up.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(out_of_memory_message(error, where)) from error


def available_memory() -> float:
    """Bytes that this process may still allocate: what is available, within the limit of its control group."""
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


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not tell.

    `getrusage` would count what the process that started this one held at that moment.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None
