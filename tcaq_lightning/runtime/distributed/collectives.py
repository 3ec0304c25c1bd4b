"""Communication between the ranks of a run; a single process gets its own values back without any communication.

All ranks must call these functions in the same order. Everything but the gradients of a step is exchanged from the CPU;
what is added up is added in rank order, so that the same number of ranks gives the same bits everywhere and each time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tcaq_lightning.runtime.distributed.shared_memory import AWAKE, SharedSums, make_file

log = logging.getLogger(__name__)

T = TypeVar("T")

_sums: list[SharedSums] = []
"""This rank's end of the memory that the ranks share, if they do."""


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among the ranks; rank 0 alone writes files and the console."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """The part of a sequence that is this rank's: neighbours, and with the other ranks' parts in rank order all of it.

    >>> share(range(5))
    range(0, 5)
    """
    number, ranks = rank(), world_size()
    return items[len(items) * number // ranks : len(items) * (number + 1) // ranks]


def is_mine(number: int) -> bool:
    """Whether this rank does the numbered piece of work, where single pieces are dealt in turn."""
    return number % world_size() == rank()


@dataclass
class _Announced:
    """Stands for a tensor that follows by itself."""

    shape: torch.Size
    dtype: torch.dtype


def broadcast(value: T, source: int = 0) -> T:
    """What rank `source` gave: plain values and, also within lists, tuples and dictionaries, tensors.

    Tensors arrive on the CPU.

    Args:
        value: looked at on rank `source` only.
        source: rank.
    """
    if world_size() == 1:
        return value
    leaves: list[Any] = []
    message: list[Any] = [None]
    tensors: list[Tensor] = []
    if rank() == source:
        leaves, spec = tree_flatten(value)
        tensors = [x.detach().cpu().contiguous() for x in leaves if isinstance(x, Tensor)]
        message = [tree_unflatten([_Announced(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves], spec)]
    dist.broadcast_object_list(message, source)
    if rank() != source:
        leaves, spec = tree_flatten(message[0])
        tensors = [torch.empty(x.shape, dtype=x.dtype) for x in leaves if isinstance(x, _Announced)]
    for x in tensors:
        dist.broadcast(x, source)
    if rank() == source:
        return value
    arrived = iter(tensors)
    received: T = tree_unflatten([next(arrived) if isinstance(x, _Announced) else x for x in leaves], spec)
    return received


def gather(value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank; values as in `broadcast`, of any shape on each rank."""
    return [broadcast(value, source) for source in range(world_size())]


def on_main(function: Callable[[], T]) -> T:
    """Let rank 0 alone do something, such as reading or writing a file of the run.

    Returns:
        What `function` returned there, on every rank.

    Raises:
        Exception: what `function` raised there, on every rank.
    """
    if world_size() == 1:
        return function()
    result: Any = None
    error: Exception | None = None
    if is_main():
        try:
            result = function()
        except Exception as raised:  # noqa: BLE001 - raised again below, on all ranks
            error = raised
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def total(x: Tensor) -> Tensor:
    """Sum over the ranks of a CPU tensor of one shape; exact for integers."""
    if world_size() == 1:
        return x
    return torch.stack(_gather_equal(x)).sum(0)


def smallest(x: Tensor) -> Tensor:
    """Elementwise minimum over the ranks of a CPU tensor of one shape."""
    return x if world_size() == 1 else torch.stack(_gather_equal(x)).amin(0)


def largest(x: Tensor) -> Tensor:
    """Elementwise maximum over the ranks of a CPU tensor of one shape."""
    return x if world_size() == 1 else torch.stack(_gather_equal(x)).amax(0)


def _gather_equal(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


@contextmanager
def memory_shared(timeout: float) -> Iterator[None]:
    """Within, average CPU tensors in memory that the ranks share, where the system lets them, and not through sockets.

    Args:
        timeout: seconds after which waiting for another rank is an error.
    """
    sums = _shared_sums(timeout)
    _sums.extend(sums)
    try:
        yield
    finally:
        for end in sums:
            _sums.remove(end)
            end.close()


def _shared_sums(timeout: float) -> list[SharedSums]:
    """This rank's end, or none on any rank."""
    descriptor, file, sums = -1, None, []
    if is_main():
        with suppress(OSError):
            descriptor, file = make_file(SharedSums.size(world_size()))
    file = broadcast(file)
    if file is not None:
        with suppress(OSError):
            descriptor = descriptor if is_main() else file.open()
            sums.append(SharedSums(descriptor, rank(), world_size(), timeout))
    if all(gather(bool(sums))):
        return sums
    log.info("the ranks cannot share memory here: gradients go through the process group")
    if descriptor >= 0:
        os.close(descriptor)
    return []


@torch.no_grad()
def average_and_gather(
    averaged: Sequence[Tensor], rows: Tensor, meanwhile: Callable[[], None] = lambda: None
) -> Tensor:
    """Average tensors over the ranks in place and gather rows beside them, all in one exchange.

    The order within the reduction is that of the arguments, always: torch's DistributedDataParallel arranges its
    buckets anew after the first step, so that a fit resumed in the middle would round differently.

    Args:
        averaged: floating-point tensors on one device, the same shapes on each rank.
        rows: (B, C) on the same device, the same shape on each rank.
        meanwhile: other work for the time until all ranks have come. It also lets a rank that was late at one step be
            early at the next one, instead of holding up the others at both.

    Returns:
        (R*B, C) rows of all R ranks in rank order, exact: all but one summand of each is 0.
    """
    if world_size() == 1:
        return rows
    spread = rows.new_zeros(world_size(), *rows.shape)
    spread[rank()] = rows
    flat = torch.cat([x.flatten() for x in (*averaged, spread)])
    if _sums and flat.device.type == "cpu":
        _sums[0].add_up(flat, meanwhile)
    else:
        reduction = dist.all_reduce(flat, async_op=True)
        meanwhile()
        _wait_awake(reduction, flat.device)
    flat[: flat.numel() - spread.numel()].div_(world_size())
    *means, gathered = torch.split(flat, [x.numel() for x in (*averaged, spread)])
    for x, mean in zip(averaged, means, strict=True):
        x.copy_(mean.view_as(x))
    return gathered.view(-1, rows.shape[1])


def _wait_awake(work: Any, device: torch.device) -> None:
    """Wait for an exchange between CPUs without sleeping, but for a while at most.

    To be woken takes longer than to exchange a step's few gradients where each rank has one core. Threads that could
    use the core, such as those of the exchange, go first.
    """
    if device.type == "cpu" and hasattr(os, "sched_yield"):
        end = time.monotonic() + AWAKE
        while not work.is_completed() and time.monotonic() < end:
            os.sched_yield()
    work.wait()
