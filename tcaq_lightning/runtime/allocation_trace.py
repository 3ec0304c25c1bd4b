"""What a piece of work allocates: traced on few samples, scaled to many."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BLOCKED = {torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default}
"""Operators whose CPU kernels work on copies of all operands in a layout of their own."""
SIZES = (2, 3)
"""Samples that work is traced on. Not 1: more layouts of one sample are contiguous, so that it needs fewer copies."""


@dataclass
class AllocationTrace:
    """Storages in the order in which they came and went.

    Attributes:
        sizes: bytes of each storage.
        events: in order: i where storage i was allocated, ~i where it was freed.
    """

    sizes: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)

    def peak(self) -> int:
        """Largest number of bytes alive at once.

        >>> AllocationTrace([5, 3, 4], [0, 1, ~0, 2]).peak()
        8
        """
        alive = largest = 0
        for event in self.events:
            alive += self.sizes[event] if event >= 0 else -self.sizes[~event]
            largest = max(largest, alive)
        return largest


class TracedAllocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record every tensor storage that operations of this thread make, until it is freed.

    Earlier storages are not seen, nor the memory that kernels allocate internally; convolutions on a CPU are assumed
    to copy their operands and results.

    Args:
        stood_for: type of the device that tensors on the meta device stand for.
    """

    def __init__(self, stood_for: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copying = ("cpu", "meta") if stood_for == "cpu" else ("cpu",)
        self.trace = AllocationTrace()
        self._numbers: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False) or (args and result is args[0]):  # nothing new, quickly seen
            return result
        made = [x for x in _storages((result,)) if id(x) not in self._numbers]
        if made:  # else it was here before: a view, or what was written in place
            given = {id(x) for x in _storages((args, tuple((kwargs or {}).values())))}
            for storage in made:
                if id(storage) not in given and id(storage) not in self._numbers:
                    self._add(storage)
        if func in BLOCKED:
            self._pass_by(sum(x.nbytes() for x in _storages((args, result)) if x.device.type in self._copying))
        return result

    def _add(self, storage: Any) -> None:
        key, number = id(storage), len(self.trace.sizes)
        self._numbers[key] = number
        self.trace.sizes.append(storage.nbytes())
        self.trace.events.append(number)
        self._references[key] = weakref.ref(storage, lambda _: self._remove(key))

    def _pass_by(self, nbytes: int) -> None:
        """Bytes that an operation used beside its operands and results, and freed again."""
        number = len(self.trace.sizes)
        self.trace.sizes.append(nbytes)
        self.trace.events += [number, ~number]

    def _remove(self, key: int) -> None:
        del self._references[key]
        self.trace.events.append(~self._numbers.pop(key))


def _storages(values: Sequence[Any]) -> Iterator[Any]:
    """Storages of the tensors in nested sequences, as operators take and return them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.untyped_storage()
        elif isinstance(value, (list, tuple)):
            yield from _storages(value)


def scaled_peak(work: Callable[[int], Any], samples: int, stood_for: str = "meta") -> int:
    """Bytes that `work(samples)` would hold at once, extrapolated from traces on few samples.

    Every storage grows linearly with the number of samples. Where the two traces do not match storage by storage,
    their peaks are scaled.

    Args:
        work: runs on so many samples; what it returns stays alive until its end.
        samples: to scale to.
        stood_for: as in `TracedAllocations`.
    """
    first, second = (_traced(work, size, stood_for) for size in SIZES)
    if len(first.sizes) != len(second.sizes):
        return _linear(first.peak(), second.peak(), samples)
    sizes = [_linear(a, b, samples) for a, b in zip(first.sizes, second.sizes, strict=True)]
    return AllocationTrace(sizes, second.events).peak()


def _traced(work: Callable[[int], Any], samples: int, stood_for: str) -> AllocationTrace:
    traced = TracedAllocations(stood_for)
    with traced:
        kept = work(samples)
    del kept
    return traced.trace


def _linear(first: int, second: int, samples: int) -> int:
    """Value at `samples` of the line through the values at `SIZES`."""
    a, b = SIZES
    return first + (second - first) * (samples - a) // (b - a)
