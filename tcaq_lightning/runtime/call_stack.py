"""Room for Python's call frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_FRAME_SLOTS = 20_000
"""Of the frame that makes room: 160 kB, so that its chunk has 256 kB, and nearly 100 kB for the frames within."""


def with_room_for_frames(call: Callable[[], Result]) -> Result:
    """call(), whose own calls, and theirs, find their frames in one piece of memory.

    CPython (3.11 and newer) keeps frames in chunks of 16 kB. A call that does not fit into the present one gets a chunk
    from the system, and returns it when it ends: about ten microseconds instead of a tenth. A loop that runs where a
    chunk ends pays that again and again, up to 1.4 ms in an optimisation step. A larger frame begins a larger chunk.

    >>> with_room_for_frames(lambda: 3)
    3
    """
    return call()


with_room_for_frames.__code__ = with_room_for_frames.__code__.replace(co_stacksize=_FRAME_SLOTS)
