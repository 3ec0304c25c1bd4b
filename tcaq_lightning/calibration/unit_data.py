"""What one unit is calibrated on: its inputs and targets, and how its arguments are kept apart and put together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from tcaq_lightning.calibration.prefetch import read_ahead
from tcaq_lightning.models.unit_outputs import Outputs, by_sample, channel_count, output_tensors
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs) of a call."""


@dataclass
class Batch:
    """Some of a unit's calibration samples, on the device.

    Attributes:
        args: the unit's positional arguments.
        kwargs: its keyword arguments.
        targets: its full-precision outputs.
        groups: (B,) timestep groups.
        weights: (B, C) of squared errors by sample and output channel, those of all outputs in sequence; None weighs
            all of them 1.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Outputs
    groups: Tensor
    weights: Tensor | None = None


@dataclass
class UnitData:
    """What one unit is reconstructed from, for N calibration samples.

    Attributes:
        inputs: tensors of the unit's arguments, each (N, ...), from the quantized stream; (N, k, ...) of those that the
            unit is given k rows a sample of.
        constants: by position among the flattened arguments, those that are the same for all samples.
        spec: how the flattened arguments form (args, kwargs).
        targets: what the full-precision unit returned in the full-precision stream, tensors (N, ...) or (N, k, ...).
        groups: (N,) timestep group of each sample.
        weights: (G, C) of squared errors by timestep group and output channel, those of all outputs in sequence; None
            weighs all of them 1.
        dtype: that floating-point values are computed in; the store may hold narrower ones.
        executed: on how many samples the quantized unit has run so far.
        folded: numbers of the inputs with several rows a sample.
        dtypes: of each input, where they are not all `dtype`.
        in_files: whether some of the tensors are in memory-mapped files.
    """

    inputs: list[Tensor]
    constants: dict[int, Any]
    spec: TreeSpec
    targets: Outputs
    groups: Tensor
    weights: Tensor | None = None
    dtype: torch.dtype = torch.float32
    executed: int = 0
    folded: frozenset[int] = frozenset()
    dtypes: list[torch.dtype] | None = None
    in_files: bool = False

    def __len__(self) -> int:
        return self.groups.shape[0]

    @property
    def channels(self) -> int:
        """Output channels, those of all outputs together."""
        return sum(channel_count(tuple(x.shape[1:])) for x in output_tensors(self.targets))

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [*self.inputs, *output_tensors(self.targets)]

    def select(self, index: Tensor | slice) -> UnitData:
        """Some of the samples as data of their own."""
        inputs = [x[index] for x in self.inputs]
        targets = tree_map_only(Tensor, lambda x: x[index], self.targets)
        return replace(self, inputs=inputs, targets=targets, groups=self.groups[index], executed=0)

    def read(self, index: Tensor | slice, device: torch.device) -> Batch:
        """The chosen samples."""
        inputs = iter([self._input(number, index, device) for number in range(len(self.inputs))])
        total = len(self.inputs) + len(self.constants)
        leaves = [self.constants[i] if i in self.constants else next(inputs) for i in range(total)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        exact = torch.promote_types(self.dtype, torch.float32)  # errors are not computed in narrower types
        targets = tree_map_only(Tensor, lambda stored: self._load(stored, index, device, exact), self.targets)
        groups = self.groups[index]
        weights = None if self.weights is None else self.weights[groups.to(self.weights.device)].to(device)
        return Batch(args, kwargs, targets, groups.to(device), weights)

    def batches(self, indices: Iterable[Tensor | slice], device: torch.device) -> Generator[Batch, None, None]:
        """Batch after batch, the next one read while the present one is computed, where reading means waiting.

        From memory to the CPU it does not, and a thread would take its time from the same cores.
        """
        read, waits = partial(self.read, device=device), self.in_files or device.type not in {"cpu", "meta"}
        return read_ahead(read, indices) if waits else (read(index) for index in indices)

    def run(
        self, unit: Callable[..., Outputs], timestep_groups: TimestepGroups, index: Tensor | slice, device: torch.device
    ) -> Outputs:
        """The unit's output on the chosen samples, shaped like the targets.

        Args:
            unit: full-precision or quantized.
            timestep_groups: those of the denoiser.
            index: which of the samples.
            device: where to compute.
        """
        return self.run_batch(unit, timestep_groups, self.read(index, device))

    def run_batch(self, unit: Callable[..., Outputs], timestep_groups: TimestepGroups, batch: Batch) -> Outputs:
        """The unit's output on a batch, shaped like the targets.

        Args:
            unit: full-precision or quantized.
            timestep_groups: those of the denoiser.
            batch: read from these samples.
        """
        self.executed += len(batch.groups)
        with timestep_groups.using(batch.groups):
            output = unit(*batch.args, **batch.kwargs)
        targets = iter(output_tensors(batch.targets))
        return tree_map_only(Tensor, lambda x: _like(x, next(targets)), output)

    def _input(self, number: int, index: Tensor | slice, device: torch.device) -> Tensor:
        loaded = self._load(
            self.inputs[number], index, device, self.dtype if self.dtypes is None else self.dtypes[number]
        )
        return loaded.flatten(0, 1) if number in self.folded else loaded

    @staticmethod
    def _load(stored: Tensor, index: Tensor | slice, device: torch.device, dtype: torch.dtype) -> Tensor:
        chosen = stored.index_select(0, index) if isinstance(index, Tensor) else stored[index]  # twice as fast
        return chosen.to(device, dtype if stored.is_floating_point() else stored.dtype)


def _like(output: Tensor, target: Tensor) -> Tensor:
    """An output in the shape of its target."""
    return output if output.shape == target.shape else output.reshape(target.shape)


@dataclass
class SplitArguments:
    """A unit's arguments as `UnitData` keeps them: its fields of these names."""

    inputs: list[Tensor]
    constants: dict[int, Any]
    spec: TreeSpec
    folded: frozenset[int]
    dtypes: list[torch.dtype]


def split_arguments(arguments: Arguments, batch: int, rows: tuple[int, ...] | None = None) -> SplitArguments:
    """Tell a unit's arguments apart: what belongs to the samples, and what is the same for all.

    Args:
        arguments: (args, kwargs).
        batch: B, the number of samples.
        rows: for each flattened argument, its rows per sample; 0 if it is the same for all samples. None: tensors of B
            rows have one row per sample, everything else has none.
    """
    leaves, spec = tree_flatten(arguments)
    if rows is None:
        rows = tuple(int(isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == batch) for x in leaves)
    batched = [x for x, count in zip(leaves, rows, strict=True) if count]
    return SplitArguments(
        [by_sample(x, batch) for x in batched],
        {i: x for i, (x, count) in enumerate(zip(leaves, rows, strict=True)) if not count},
        spec,
        frozenset(number for number, count in enumerate(c for c in rows if c) if count > 1),
        [x.dtype for x in batched],
    )
