"""Where activations are kept: on the accelerator, in host memory, then in memory-mapped files, within one budget."""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tcaq_lightning.config import MemoryBudget
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.files import TEMPORARY
from tcaq_lightning.runtime.memory import available_memory

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk")
"""In the order in which they are filled."""

GIGABYTE = 10**9


@dataclass
class Ledger:
    """Bytes in use by tier: each array goes whole to the first tier that has room for it.

    Attributes:
        limits: bytes that each tier may hold.
        used: bytes in use by tier.
        peak: most bytes in use so far, by tier.

    >>> ledger = Ledger({"device": 0, "host": 10, "disk": 10})
    >>> ledger.place(8), ledger.place(8)
    ('host', 'disk')
    >>> ledger.free("host", 8)
    >>> ledger.place(4)
    'host'
    """

    limits: dict[Tier, float]
    used: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    peak: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))

    def place(self, nbytes: int) -> Tier:
        """Book an array.

        Raises:
            UserError: no tier has room for it.
        """
        for tier in TIERS:
            if self.used[tier] + nbytes <= self.limits[tier]:
                self.used[tier] += nbytes
                self.peak[tier] = max(self.peak[tier], self.used[tier])
                return tier
        room = ", ".join(f"{tier} {self.limits[tier] / GIGABYTE:.3g}" for tier in TIERS)
        raise UserError(
            f"calibration.memory_budget ({room} GB) has no room left for {nbytes / GIGABYTE:.3g} GB more; "
            "calibrate on fewer trajectories"
        )

    def free(self, tier: Tier, nbytes: int) -> None:
        """Undo `place`."""
        self.used[tier] -= nbytes


def resolve_limits(
    budget: MemoryBudget, device: torch.device, directory: Path, processes: int = 1
) -> dict[Tier, float]:
    """Bytes that each tier may take; limits that the budget leaves open depend on the memory that is free now.

    Args:
        budget: in GB; None for all that the machine has.
        device: of the calibration; on a CPU there is no device tier, since its memory is the host's.
        directory: of the memory-mapped files; it may not exist yet.
        processes: number of processes that share the machine.
    """
    limits: dict[Tier, float] = {
        "device": 0.0,
        "host": available_memory() / 2 / processes,
        "disk": free_disk(directory) / processes,
    }
    if device.type == "cuda":
        limits["device"] = torch.cuda.mem_get_info(device)[0] / 2
    for tier in TIERS:
        gigabytes = getattr(budget, tier)
        if gigabytes is not None and (tier != "device" or device.type != "cpu"):
            limits[tier] = math.floor(gigabytes * GIGABYTE)
    return limits


def free_disk(directory: Path) -> float:
    """Free bytes on the file system of a directory, which may not exist yet."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return float(shutil.disk_usage(existing).free)


class ActivationStorage:
    """Hands out uninitialized tensors from the tiers of a budget.

    Each tensor in host memory or in a file has its own mapping, which returns to the system as soon as it is freed.
    Files are unlinked once they are mapped, so nothing is left of them, however the process ends.

    Args:
        limits: bytes by tier.
        device: of the device tier.
        directory: of the files.
        dtype: what floating-point tensors are stored as.
    """

    def __init__(
        self,
        limits: dict[Tier, float],
        device: torch.device,
        directory: Path,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.ledger = Ledger(limits)
        self.device = device
        self.directory = directory
        self.dtype = dtype
        self._tiers: dict[int, Tier] = {}

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor for values of the given type.

        Args:
            shape: of the tensor.
            dtype: of the values; floating-point ones are stored in the storage's own type.

        Raises:
            UserError: the budget is used up.
            OSError: no space is left for a file.
        """
        stored = self.dtype if dtype.is_floating_point else dtype
        nbytes = math.prod(shape) * stored.itemsize
        tier = self.ledger.place(nbytes)
        try:
            tensor = self._make(tier, shape, stored, nbytes)
        except BaseException:
            self.ledger.free(tier, nbytes)
            raise
        self._tiers[id(tensor)] = tier
        return tensor

    def free(self, tensor: Tensor) -> None:
        """Return a tensor's bytes to the budget; its memory is freed with the last reference to it."""
        self.ledger.free(self._tiers.pop(id(tensor)), tensor.nbytes)

    def in_file(self, tensor: Tensor) -> bool:
        """Whether a tensor of this storage is a memory-mapped file."""
        return self._tiers[id(tensor)] == "disk"

    def _make(self, tier: Tier, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> Tensor:
        if tier == "device" or nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if tier == "host":
            buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            buffer = self._map_file(nbytes)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def _map_file(self, nbytes: int) -> mmap.mmap:
        self.directory.mkdir(parents=True, exist_ok=True)
        prefix, suffix = TEMPORARY.split("*")
        descriptor, name = tempfile.mkstemp(suffix, f"{prefix}activations-", self.directory)
        try:
            Path(name).unlink()
            _reserve(descriptor, nbytes, name)
            return mmap.mmap(descriptor, nbytes)
        finally:
            os.close(descriptor)


def _reserve(descriptor: int, nbytes: int, name: str) -> None:
    """Allocate a file's blocks: a write to a mapping could not report that the disk is full."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)
        else:
            os.ftruncate(descriptor, nbytes)
    except OSError as error:
        error.filename = name
        raise
