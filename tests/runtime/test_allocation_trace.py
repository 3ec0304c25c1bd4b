from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tcaq_lightning.runtime.allocation_trace import SIZES, AllocationTrace, TracedAllocations, scaled_peak

FLOAT = 4


def peak_of(work: object) -> int:
    with TracedAllocations() as traced:
        kept = work()  # type: ignore[operator]
    del kept
    return traced.trace.peak()


def test_what_is_freed_no_longer_counts() -> None:
    def work() -> Tensor:
        x = torch.zeros(100)
        for _ in range(5):
            x = x + 1  # old and new at once, never more
        return x

    assert peak_of(work) == 2 * 100 * FLOAT


def test_what_was_there_before_does_not_count() -> None:
    before = torch.zeros(1000)

    def work() -> Tensor:
        before.add_(1)
        view = before[10:].view(-1, 2).transpose(0, 1)
        return view.sum()

    assert peak_of(work) == FLOAT


def test_saved_tensors_and_gradients_count() -> None:
    weight = torch.ones(50, requires_grad=True)

    def work() -> None:
        ((weight * 2).square() * 3).sum().backward()  # type: ignore[no-untyped-call]

    assert 3 * 50 * FLOAT <= peak_of(work) <= 6 * 50 * FLOAT
    assert weight.grad is not None


@pytest.mark.parametrize("samples", [1, 7, 64])
def test_scaled_to_any_number_of_samples(samples: int) -> None:
    """Also where another moment is the largest one than on few samples."""
    weight = torch.randn(16, 8)

    def work(count: int) -> None:
        large = torch.zeros(1000)
        del large
        x = torch.randn(count, 16).requires_grad_()
        hidden = (x @ weight).relu()
        torch.cat([hidden, hidden.exp()]).sum().backward()

    assert scaled_peak(work, samples) == peak_of(lambda: work(samples))


def test_work_that_differs_between_sizes_is_scaled_by_its_peaks() -> None:
    def work(count: int) -> list[Tensor]:
        return [torch.zeros(10) for _ in range(count)]

    assert scaled_peak(work, 20) == 20 * 10 * FLOAT


def test_two_sizes_tell_what_grows() -> None:
    assert len(set(SIZES)) == 2
    assert min(SIZES) > 1


def test_peak_of_an_empty_trace() -> None:
    assert AllocationTrace().peak() == 0
