from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from tcaq_lightning import cores
from tcaq_lightning.cores import available_cores, held_to, own_cores
from tcaq_lightning.environment import Place


def allow(monkeypatch: pytest.MonkeyPatch, allowed: set[int], topology: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
    monkeypatch.setattr(cores, "TOPOLOGY", topology)


def describe(topology: Path, core: int, package: int, physical: int) -> None:
    directory = topology / f"cpu{core}" / "topology"
    directory.mkdir(parents=True)
    (directory / "physical_package_id").write_text(f"{package}\n")
    (directory / "core_id").write_text(f"{physical}\n")


def test_threads_of_a_core_and_cores_of_a_package_are_neighbours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for core in range(8):  # two packages of two cores of two threads, numbered as Linux does
        describe(tmp_path, core, package=core % 2, physical=core // 2 % 2)
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
    ("local_rank", "node", "everyone", "expected"),
    [
        (0, 0, [[0, 1, 2, 3, 4]] * 2, [0, 1]),
        (1, 0, [[0, 1, 2, 3, 4]] * 2, [2, 3, 4]),
        (1, 1, [[7]] * 2 + [[0, 1, 2, 3]] * 2, [2, 3]),  # the other node is another machine
        (1, 0, [[0, 1], [2, 3]], [2, 3]),  # whatever has started them has divided the cores
        (1, 0, [[0, 1], [0, 1, 2]], [0, 1, 2]),
        (1, 0, [[5]] * 2, [5]),
    ],
)
def test_ranks_divide_the_cores_that_all_of_their_node_may_use(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, node: int, everyone: list[list[int]], expected: list[int]
) -> None:
    place = Place(2 * node + local_rank, local_rank, devices=2, num_nodes=len(everyone) // 2)
    monkeypatch.setattr(cores, "available_cores", lambda: everyone[place.rank])
    monkeypatch.setattr(cores, "gather", lambda _: everyone)
    assert own_cores(place) == expected


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
