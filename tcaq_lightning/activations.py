"""The activation store: both streams, propagated from unit to unit and never re-run.

To get a unit's inputs, the denoiser's own forward is replayed with every finished unit replaced by a stub that hands
out its stored output, and stopped at the unit: only glue (concatenation, addition, interpolation) is computed, and no
knowledge of the model is needed. Outputs that no later unit depends on are freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tcaq_lightning.timesteps import TimestepGroups
from tcaq_lightning.units import Stop, UnitGraph, patched_forwards


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
    """

    inputs: list[Tensor]
    constants: dict[int, Any]
    spec: TreeSpec
    targets: Tensor
    groups: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return self.targets.shape[0]

    def arguments(self, index: Tensor | slice, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the unit for the chosen samples."""
        batched = iter(self.inputs)
        total = len(self.inputs) + len(self.constants)
        leaves = [self.constants[i] if i in self.constants else next(batched)[index].to(device) for i in range(total)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    def run(self, unit: nn.Module, context: TimestepGroups, index: Tensor | slice, device: torch.device) -> Tensor:
        """The unit's output on the chosen samples."""
        args, kwargs = self.arguments(index, device)
        with context.using(self.groups[index].to(device)):
            output: Tensor = unit(*args, **kwargs)
        return output


class Streams:
    """Stored outputs of the finished units, in the full-precision and in the quantized stream.

    Each unit runs once per stream and sample: `load` runs the full-precision unit on its inputs, which gives the
    targets, and `store` the quantized one.

    Args:
        full, quantized: denoisers with equally named units.
        graph: execution order and dependencies.
        context: the quantized denoiser's timestep groups.
        x, timesteps: (N, C, H, W) and (N,), the calibration samples.
        batch_size: samples per pass.
    """

    def __init__(
        self,
        full: nn.Module,
        quantized: nn.Module,
        graph: UnitGraph,
        context: TimestepGroups,
        x: Tensor,
        timesteps: Tensor,
        batch_size: int,
    ) -> None:
        self.full, self.quantized, self.graph, self.context = full, quantized, graph, context
        self.x, self.timesteps = x, timesteps
        self.groups = context.of(timesteps)
        self.batch_size = batch_size
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
                targets[batch] = unit(*args, **kwargs).to(targets.device)
        self._full[name] = targets

        inputs: list[Tensor] = []
        constants: dict[int, Any] = {}
        spec: TreeSpec | None = None
        for batch, arguments in self._replays(self.quantized, self._quantized, position):
            leaves, spec = tree_flatten(arguments)
            batched = [x for x in leaves if self._is_batched(x, batch)]
            if not inputs:
                inputs = [torch.empty(len(self.x), *x.shape[1:], dtype=x.dtype) for x in batched]
                constants = {i: x for i, x in enumerate(leaves) if not self._is_batched(x, batch)}
            for stored, x in zip(inputs, batched, strict=True):
                stored[batch] = x.to(stored.device)
        assert spec is not None
        return UnitData(inputs, constants, spec, targets, self.groups)

    @torch.no_grad()
    def store(self, position: int, data: UnitData) -> None:
        """Run the finished quantized unit on its inputs, keep its outputs, and free what no later unit needs."""
        name = self.graph.names[position]
        alive = self.graph.alive_after(position)
        if name in alive:
            unit = self.quantized.get_submodule(name)
            outputs = self._allocate(name)
            for batch in self._batches():
                outputs[batch] = data.run(unit, self.context, batch, self.device).to(outputs.device)
            self._quantized[name] = outputs
        for stored in (self._full, self._quantized):
            for done in set(stored) - alive:
                del stored[done]

    def _allocate(self, name: str) -> Tensor:
        return torch.empty(len(self.x), *self.graph.output_shapes[name], dtype=self.x.dtype)

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self.x), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self.x)))

    @staticmethod
    def _is_batched(x: object, batch: slice) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == batch.stop - batch.start

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
                    denoiser(self.x[batch].to(self.device), self.timesteps[batch].to(self.device), return_dict=False)
                raise RuntimeError(f"unit {name} was not reached; the denoiser's path must not depend on values")
            except Stop as reached:
                arguments = reached.args_kwargs
            yield batch, arguments

    def _stub(self, name: str, outputs: Tensor | None, batch: slice) -> Callable[..., Tensor]:
        def forward(*_: Any, **__: Any) -> Tensor:
            if outputs is None:  # freed: NaN, so that a use of it would show at once
                shape = (batch.stop - batch.start, *self.graph.output_shapes[name])
                return torch.full((), torch.nan, device=self.device).expand(shape)
            return outputs[batch].to(self.device, copy=True)  # glue may write in place

        return forward


def _stop(*args: Any, **kwargs: Any) -> None:
    raise Stop(args, kwargs)


def store_bytes(graph: UnitGraph, inputs: Sequence[int], samples: int, element_size: int = 4) -> int:
    """Largest number of bytes that the store holds at once.

    Args:
        graph: units with their output shapes.
        inputs: elements of each unit's inputs per sample, in execution order.
        samples: N.
        element_size: bytes of a value.
    """

    def size(name: str) -> int:
        return torch.Size(graph.output_shapes[name]).numel()

    peak = 0
    for position, name in enumerate(graph.names):
        before = graph.alive_after(position - 1) if position else set()
        held = 2 * sum(size(n) for n in before) + inputs[position] + 2 * size(name)
        peak = max(peak, held)
    return peak * samples * element_size
