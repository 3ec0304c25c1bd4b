from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.distributed import collectives

ROOT = Path(__file__).parents[3]


def test_one_process_communicates_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a collective in a single process")

    for name in ("broadcast", "broadcast_object_list", "all_gather", "all_reduce", "barrier"):
        monkeypatch.setattr(torch.distributed, name, forbidden)
    x = torch.randn(3, 2)
    value = {"x": x}
    assert collectives.broadcast(value) is value
    assert collectives.gather(value) == [value]
    assert collectives.on_main(lambda: value) is value
    for reduced in (collectives.total(x), collectives.smallest(x), collectives.largest(x)):
        assert reduced is x
    assert collectives.average_and_gather([x], x) is x
    assert list(collectives.share([1, 2, 3])) == [1, 2, 3]
    with pytest.raises(UserError, match="mine"):
        collectives.on_main(_raise)


def _raise() -> None:
    raise UserError("mine")


@pytest.mark.parametrize("looks", [3, None])
def test_waiting_without_sleep_ends_when_the_work_does_or_after_a_while(
    monkeypatch: pytest.MonkeyPatch, looks: int | None
) -> None:
    class Work:
        seen, waited = 0, 0

        def is_completed(self) -> bool:
            self.seen += 1
            return self.seen == looks

        def wait(self) -> None:
            self.waited += 1

    monkeypatch.setattr(collectives, "AWAKE", 60 if looks else 0.01)
    work = Work()
    collectives._wait_awake(work, torch.device("cpu"))
    assert work.waited == 1
    assert work.seen == looks if looks else work.seen > 0


def test_two_ranks(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "rank.py"), str(rank), str(tmp_path / "meeting")],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
