from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tcaq_lightning.runtime.distributed import affinity as cores
from tcaq_lightning.runtime.distributed.affinity import available_cores, held_to, own_cores


def allow(monkeypatch: pytest.MonkeyPatch, allowed: set[int], topology: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
    monkeypatch.setattr(cores, "TOPOLOGY", topology)


def describe(topology: Path, core: int, package: int, siblings: str) -> None:
    directory = topology / f"cpu{core}" / "topology"
    directory.mkdir(parents=True)
    (directory / "physical_package_id").write_text(f"{package}\n")
    (directory / "thread_siblings_list").write_text(f"{siblings}\n")


def test_threads_of_a_core_and_cores_of_a_package_are_neighbours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for core in range(8):  # two packages of two cores of two threads, numbered as Linux does
        describe(tmp_path, core, package=core % 2, siblings=f"{core % 4},{core % 4 + 4}")
    allow(monkeypatch, {0, 1, 2, 3, 4, 5, 6}, tmp_path)
    assert available_cores() == [0, 4, 2, 6, 1, 5, 3]


def test_cores_that_the_system_tells_nothing_of_are_in_their_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    allow(monkeypatch, {9, 3, 10}, tmp_path)
    assert available_cores() == [3, 9, 10]


def test_systems_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    assert available_cores() == list(range(os.cpu_count() or 1))
    with held_to([0]):
        pass


@pytest.mark.parametrize(
    ("everyone", "expected"),
    [
        ([("a", [0, 1, 2, 3, 4])] * 2, [[0, 1], [2, 3, 4]]),
        ([("a", [7]), ("b", [0, 1, 2, 3]), ("b", [0, 1, 2, 3])], [[7], [0, 1], [2, 3]]),
        ([("a", [0, 1]), ("b", [0, 1]), ("a", [0, 1]), ("b", [0, 1])], [[0], [0], [1], [1]]),  # dealt in turn
        ([("a", [0, 1]), ("a", [2, 3])], [[0, 1], [2, 3]]),  # whatever has started them has divided the cores
        ([("a", [0, 1]), ("a", [0, 1]), ("a", [2, 3]), ("a", [2, 3])], [[0], [1], [2], [3]]),  # by packages
        ([("a", [5])] * 2, [None, None]),
    ],
)
def test_ranks_divide_the_cores_that_they_share(
    monkeypatch: pytest.MonkeyPatch, everyone: list[Any], expected: list[list[int] | None]
) -> None:
    monkeypatch.setattr(cores, "gather", lambda _: everyone)
    for number, (system, allowed) in enumerate(everyone):
        monkeypatch.setattr(cores, "_system", lambda system=system: system)
        monkeypatch.setattr(cores, "available_cores", lambda allowed=allowed: allowed)
        monkeypatch.setattr(cores, "rank", lambda number=number: number)
        assert own_cores() == expected[number]


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux' own")
def test_all_threads_are_held_and_let_go_again() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    begin, end, seen = threading.Event(), threading.Event(), {}

    def work() -> None:
        begin.set()
        end.wait(10)

    worker = threading.Thread(target=work)
    worker.start()
    begin.wait(10)
    assert worker.native_id is not None
    with held_to([core]):
        seen["here"], seen["there"] = os.sched_getaffinity(0), os.sched_getaffinity(worker.native_id)
    seen["after"] = os.sched_getaffinity(worker.native_id)
    end.set()
    worker.join()
    assert seen == {"here": {core}, "there": {core}, "after": before}
    assert os.sched_getaffinity(0) == before
