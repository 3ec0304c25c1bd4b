from __future__ import annotations

import sys

import pytest

from tcaq_lightning.runtime.call_stack import with_room_for_frames

CHUNK = 16384
"""Bytes of a chunk of CPython's frames."""


def faults_at(depth: int, calls: int = 300) -> int:
    """Page faults of `calls` calls that are made `depth` frames further down."""
    if depth:
        return faults_at(depth - 1, calls)
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for number in range(calls):
        abs_of(number)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def abs_of(number: int) -> int:
    """Of a call that needs a frame of its own."""
    return number if number >= 0 else -number


@pytest.mark.skipif(
    sys.implementation.name != "cpython" or sys.version_info < (3, 11) or sys.platform != "linux",
    reason="frames lie in chunks from the system in CPython 3.11 and newer",
)
def test_no_depth_makes_each_call_fault() -> None:
    depths = range(2 * CHUNK // 64 // 2)
    assert max(faults_at(depth) for depth in depths) >= 300  # a chunk ends somewhere
    assert max(with_room_for_frames(lambda depth=depth: faults_at(depth)) for depth in depths) < 100


def test_results_and_errors_come_through() -> None:
    assert with_room_for_frames(lambda: "result") == "result"
    with pytest.raises(ZeroDivisionError):
        with_room_for_frames(lambda: 1 / 0)
