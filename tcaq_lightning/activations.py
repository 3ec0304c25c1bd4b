"""The activation store: both streams, propagated from unit to unit and never re-run.

To get a unit's inputs, the denoiser's own forward is replayed with every finished unit replaced by a stub that hands
out its stored output, and stopped at the unit: only glue (concatenation, addition, interpolation) is computed, and no
knowledge of the model is needed. Outputs that no later unit depends on are freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tcaq_lightning.calls import Samples
from tcaq_lightning.prefetch import read_ahead
from tcaq_lightning.storage import ActivationStorage, Ledger, Tier
from tcaq_lightning.timesteps import TimestepGroups
from tcaq_lightning.units import Stop, UnitGraph, patched_forwards

TensorKind = tuple[tuple[int, ...], torch.dtype]
"""Shape without the batch axis, and type of the values."""


@dataclass
class Batch:
    """Some of a unit's calibration samples, on the device.

    Attributes:
        args, kwargs: the unit's arguments. targets: its full-precision outputs. groups: (B,) timestep groups.
        weights: (B, C) of squared errors by sample and output channel; None weighs all of them 1.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Tensor
    groups: Tensor
    weights: Tensor | None = None


@dataclass
class UnitData:
    """What one unit is reconstructed from, for N calibration samples.

    Attributes:
        inputs: tensors of the unit's arguments, each (N, ...), from the quantized stream.
        constants: by position among the flattened arguments, those that are no batched tensors.
        spec: how the flattened arguments form (args, kwargs).
        targets: (N, ...) the full-precision unit's outputs in the full-precision stream.
        groups: (N,) timestep group of each sample.
        weights: (G, C) of squared errors by timestep group and output channel; None weighs all of them 1.
        dtype: that floating-point values are computed in; the store may hold narrower ones.
        executed: on how many samples the quantized unit has run so far.
    """

    inputs: list[Tensor]
    constants: dict[int, Any]
    spec: TreeSpec
    targets: Tensor
    groups: Tensor
    weights: Tensor | None = None
    dtype: torch.dtype = torch.float32
    executed: int = 0

    def __len__(self) -> int:
        return self.targets.shape[0]

    def read(self, index: Tensor | slice, device: torch.device) -> Batch:
        """The chosen samples."""
        stored = iter(self.inputs)
        total = len(self.inputs) + len(self.constants)
        leaves = [
            self.constants[i] if i in self.constants else self._load(next(stored), index, device) for i in range(total)
        ]
        args, kwargs = tree_unflatten(leaves, self.spec)
        targets, groups = self._load(self.targets, index, device), self.groups[index]
        weights = None if self.weights is None else self.weights[groups.to(self.weights.device)].to(device)
        return Batch(args, kwargs, targets, groups.to(device), weights)

    def batches(self, indices: Iterable[Tensor | slice], device: torch.device) -> Generator[Batch, None, None]:
        """Batch after batch, the next one read while the present one is computed."""
        return read_ahead(lambda index: self.read(index, device), indices)

    def run(
        self, unit: Callable[..., Tensor], context: TimestepGroups, index: Tensor | slice, device: torch.device
    ) -> Tensor:
        """The unit's output on the chosen samples."""
        return self.run_batch(unit, context, self.read(index, device))

    def run_batch(self, unit: Callable[..., Tensor], context: TimestepGroups, batch: Batch) -> Tensor:
        """The unit's output on a batch."""
        self.executed += len(batch.groups)
        with context.using(batch.groups):
            output: Tensor = unit(*batch.args, **batch.kwargs)
        return output

    def _load(self, stored: Tensor, index: Tensor | slice, device: torch.device) -> Tensor:
        return stored[index].to(device, self.dtype if stored.is_floating_point() else stored.dtype)


def split_arguments(arguments: Any, batch: int) -> tuple[list[Tensor], dict[int, Any], TreeSpec]:
    """A unit's arguments as `UnitData` keeps them: inputs, constants, spec.

    Args:
        arguments: (args, kwargs). batch: B; tensors of so many rows are inputs.
    """
    leaves, spec = tree_flatten(arguments)
    constants = dict(enumerate(leaves))
    batched = [i for i, x in constants.items() if isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == batch]
    return [constants.pop(i) for i in batched], constants, spec


class Streams:
    """Stored outputs of the finished units, in the full-precision and in the quantized stream.

    Each unit runs once per stream and sample: `load` runs the full-precision unit on its inputs, which gives the
    targets, and `store` the quantized one.

    Args:
        full, quantized: denoisers with equally named units.
        graph: execution order and dependencies.
        context: the quantized denoiser's timestep groups.
        samples: the N calibration samples.
        batch_size: samples per pass.
        storage: where outputs and inputs are kept.
    """

    def __init__(
        self,
        full: nn.Module,
        quantized: nn.Module,
        graph: UnitGraph,
        context: TimestepGroups,
        samples: Samples,
        batch_size: int,
        storage: ActivationStorage,
    ) -> None:
        self.full, self.quantized, self.graph, self.context = full, quantized, graph, context
        self.samples, self.dtype = samples, samples.x.dtype
        self.groups = context.of(samples.timesteps)
        self.batch_size = batch_size
        self.storage = storage
        self.device = next(full.parameters()).device
        self._full: dict[str, Tensor] = {}
        self._quantized: dict[str, Tensor] = {}

    def load(self, position: int) -> UnitData:
        """Inputs and targets of the unit at `position`; all units before it must be stored.

        Args:
            position: in execution order.
        """
        name = self.graph.names[position]
        unit = self.full.get_submodule(name)
        targets = self._allocate(name)
        for batch, (args, kwargs) in self._replays(self.full, self._full, position):
            with torch.no_grad():
                targets[batch] = unit(*args, **kwargs)
        self._full[name] = targets

        inputs: list[Tensor] = []
        constants: dict[int, Any] = {}
        spec: TreeSpec | None = None
        for batch, arguments in self._replays(self.quantized, self._quantized, position):
            batched, others, spec = split_arguments(arguments, batch.stop - batch.start)
            if not inputs:
                inputs = [self.storage.allocate((len(self.samples), *x.shape[1:]), x.dtype) for x in batched]
                constants = others
            for stored, x in zip(inputs, batched, strict=True):
                stored[batch] = x
        assert spec is not None
        return UnitData(inputs, constants, spec, targets, self.groups, dtype=self.dtype)

    @torch.no_grad()
    def store(self, position: int, data: UnitData) -> None:
        """Run the finished quantized unit on its inputs, keep its outputs, and free what no later unit needs.

        The unit's inputs are freed too: `data` is used up.
        """
        name = self.graph.names[position]
        alive = self.graph.alive_after(position)
        if name in alive:
            unit = self.quantized.get_submodule(name)
            outputs = self._allocate(name)
            for index, batch in zip(self._batches(), data.batches(self._batches(), self.device), strict=True):
                outputs[index] = data.run_batch(unit, self.context, batch)
            self._quantized[name] = outputs
        while data.inputs:
            self.storage.free(data.inputs.pop())
        for stored in (self._full, self._quantized):
            for done in set(stored) - alive:
                self.storage.free(stored.pop(done))

    def executions(self, position: int) -> dict[str, int]:
        """On how many samples `load` and `store` run the unit at `position`, by stream."""
        kept = self.graph.names[position] in self.graph.alive_after(position)
        return {"full_stream": len(self.samples), "quantized_stream": len(self.samples) if kept else 0}

    def _allocate(self, name: str) -> Tensor:
        return self.storage.allocate((len(self.samples), *self.graph.output_shapes[name]), self.dtype)

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self.samples), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self.samples)))

    @torch.no_grad()
    def _replays(
        self, denoiser: nn.Module, stored: dict[str, Tensor], position: int
    ) -> Iterator[tuple[slice, tuple[tuple[Any, ...], dict[str, Any]]]]:
        """The unit's arguments in one stream, batch by batch."""
        finished, name = self.graph.names[:position], self.graph.names[position]
        for batch in self._batches():
            forwards: dict[str, Callable[..., Any]] = {n: self._stub(n, stored.get(n), batch) for n in finished}
            forwards[name] = _stop
            try:
                with patched_forwards(denoiser, forwards):
                    self.samples[batch].predict(denoiser)
                raise RuntimeError(f"unit {name} was not reached; the denoiser's path must not depend on values")
            except Stop as reached:
                arguments = reached.args_kwargs
            yield batch, arguments

    def _stub(self, name: str, outputs: Tensor | None, batch: slice) -> Callable[..., Tensor]:
        def forward(*_: Any, **__: Any) -> Tensor:
            if outputs is None:  # freed: NaN, so that a use of it would show at once
                shape = (batch.stop - batch.start, *self.graph.output_shapes[name])
                return torch.full((), torch.nan, device=self.device).expand(shape)
            return outputs[batch].to(self.device, self.dtype, copy=True)  # glue may write in place

        return forward


def _stop(*args: Any, **kwargs: Any) -> None:
    raise Stop(args, kwargs)


def store_peaks(
    graph: UnitGraph,
    inputs: Sequence[Sequence[TensorKind]],
    samples: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    limits: dict[Tier, float],
) -> dict[Tier, int]:
    """Largest number of bytes that the store holds at once, by tier.

    Args:
        graph: units with their output shapes.
        inputs: shape (without the batch axis) and type of each of the units' inputs, in execution order.
        samples: N.
        dtype: of the units' outputs. stored: what floating-point values are stored as.
        limits: bytes by tier.

    Raises:
        UserError: the limits are too small.
    """
    ledger = Ledger(limits)

    def place(shape: tuple[int, ...], kind: torch.dtype) -> tuple[Tier, int]:
        nbytes = samples * math.prod(shape) * (stored if kind.is_floating_point else kind).itemsize
        return ledger.place(nbytes), nbytes

    outputs: dict[str, list[tuple[Tier, int]]] = {}
    for position, name in enumerate(graph.names):
        alive = graph.alive_after(position)
        shape = graph.output_shapes[name]
        outputs[name] = [place(shape, dtype)]
        read = [place(*tensor) for tensor in inputs[position]]
        if name in alive:
            outputs[name].append(place(shape, dtype))
        gone = [b for n in outputs.keys() - alive for b in outputs.pop(n)]
        for booking in (*read, *gone):
            ledger.free(*booking)
    return ledger.peak
