from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.calibration.storage import TIERS, ActivationStorage, Ledger, resolve_limits
from tcaq_lightning.config import MemoryBudget
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.memory import available_memory

CPU = torch.device("cpu")


def storage(directory: Path, host: int, disk: int, dtype: torch.dtype = torch.float32) -> ActivationStorage:
    return ActivationStorage({"device": 0, "host": host, "disk": disk}, CPU, directory, dtype)


def mappings(needle: str) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if needle in line]


def test_tensors_fill_the_host_then_the_disk_and_hold_what_is_written(tmp_path: Path) -> None:
    store = storage(tmp_path / "run", host=450, disk=1000)
    tensors = [store.allocate((10, 5), torch.float32) for _ in range(4)]
    assert store.ledger.used == {"device": 0, "host": 400, "disk": 400}
    for i, tensor in enumerate(tensors):
        tensor.copy_(torch.arange(50.0).view(10, 5) + i)
    for i, tensor in enumerate(tensors):
        assert torch.equal(tensor, torch.arange(50.0).view(10, 5) + i)
        assert torch.equal(tensor[torch.tensor([7, 0])], torch.arange(50.0).view(10, 5)[[7, 0]] + i)
    assert list((tmp_path / "run").iterdir()) == []  # mapped, and without a name
    assert len(mappings("activations-")) == 2


def test_what_is_freed_can_be_given_out_again_and_is_unmapped(tmp_path: Path) -> None:
    store = storage(tmp_path, host=0, disk=400)
    for _ in range(3):
        tensor = store.allocate((100,), torch.float32)
        with pytest.raises(UserError, match=r"calibration\.memory_budget \(device 0, host 0, disk 4e-07 GB\)"):
            store.allocate((1,), torch.float32)
        store.free(tensor)
        del tensor
        gc.collect()
        assert not mappings("activations-")
    assert store.ledger.peak == {"device": 0, "host": 0, "disk": 400}


def test_only_floating_point_is_narrowed(tmp_path: Path) -> None:
    store = storage(tmp_path, host=1000, disk=0, dtype=torch.bfloat16)
    assert store.allocate((3, 2), torch.float32).dtype == torch.bfloat16
    assert store.allocate((3,), torch.int64).dtype == torch.int64
    assert store.ledger.used["host"] == 12 + 24


def test_empty_tensors(tmp_path: Path) -> None:
    store = storage(tmp_path, host=0, disk=0)
    tensor = store.allocate((0, 4), torch.float32)
    assert tensor.shape == (0, 4)
    store.free(tensor)


@pytest.fixture
def small_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_noticed_when_a_file_is_made(tmp_path: Path) -> None:
    store = storage(tmp_path, host=0, disk=10**6)
    with pytest.raises(OSError, match="activations-"):
        store.allocate((10_000,), torch.float32)
    assert store.ledger.used["disk"] == 0
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=30), st.integers(0, 100), st.integers(0, 100))
def test_the_ledger_keeps_to_its_limits(steps: list[tuple[int, bool]], host: int, disk: int) -> None:
    ledger = Ledger({"device": 0, "host": host, "disk": disk})
    booked = []
    for nbytes, free in steps:
        if free and booked:
            ledger.free(*booked.pop(nbytes % len(booked)))
            continue
        try:
            booked.append((ledger.place(nbytes), nbytes))
        except UserError:
            assert all(ledger.used[tier] + nbytes > ledger.limits[tier] for tier in TIERS)
        for tier in TIERS:
            assert ledger.used[tier] == sum(n for t, n in booked if t == tier) <= ledger.peak[tier]
            assert ledger.peak[tier] <= ledger.limits[tier]


def test_limits_follow_the_budget_and_what_is_free(tmp_path: Path) -> None:
    given_limits = resolve_limits(MemoryBudget(device=1, host=0.5, disk=2.0000000004), CPU, tmp_path)
    assert given_limits == {"device": 0, "host": 500_000_000, "disk": 2_000_000_000}
    found = resolve_limits(MemoryBudget(), CPU, tmp_path / "not" / "yet")
    assert found["device"] == 0
    assert found["host"] == pytest.approx(available_memory() / 2, rel=0.2)
    assert found["disk"] > 10**6


def test_available_memory_is_less_than_the_machine_has() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 10**8 < available_memory() < total
