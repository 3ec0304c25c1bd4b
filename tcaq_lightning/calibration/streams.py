"""The activation store: both streams, propagated from unit to unit and never re-run.

To get a unit's inputs, the denoiser's own forward is replayed and stopped at the unit, with every finished unit
replaced by a stub that returns its stored output. Only the glue that the unit's inputs depend on (concatenation,
addition, interpolation) is computed, and no knowledge of the model is needed. Outputs that no later unit depends on are
freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tcaq_lightning.calibration.storage import ActivationStorage, Ledger, Tier
from tcaq_lightning.calibration.unit_data import SplitArguments, UnitData, split_arguments
from tcaq_lightning.models.denoiser_calls import Samples
from tcaq_lightning.models.forwards import Stop, dtype_at_hand, patched_forwards
from tcaq_lightning.models.graph import UnitGraph
from tcaq_lightning.models.shape_only import Absent, absent
from tcaq_lightning.models.unit_outputs import Outputs, output_tensors
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups

TensorKind = tuple[tuple[int, ...], torch.dtype]
"""Shape without the batch axis, and type of the values."""


class Streams:
    """Stored outputs of the finished units, in the full-precision and in the quantized stream.

    Each unit runs once per stream and sample: `load` runs the full-precision unit on its inputs, which gives the
    targets, and `store` the quantized one.

    Args:
        full: full-precision denoiser.
        quantized: its quantized twin, with units of the same names.
        graph: execution order and dependencies.
        timestep_groups: those of the quantized denoiser.
        samples: the N calibration samples.
        batch_size: samples per pass.
        storage: where outputs and inputs are kept.
    """

    def __init__(
        self,
        full: nn.Module,
        quantized: nn.Module,
        graph: UnitGraph,
        timestep_groups: TimestepGroups,
        samples: Samples,
        batch_size: int,
        storage: ActivationStorage,
    ) -> None:
        self.full, self.quantized, self.graph, self.timestep_groups = full, quantized, graph, timestep_groups
        self.samples, self.dtype = samples, samples.x.dtype
        self.groups = timestep_groups.of(samples.timesteps)
        self.batch_size = batch_size
        self.storage = storage
        self.device = next(full.parameters()).device
        self._full: dict[str, Tensor] = {}
        self._quantized: dict[str, Tensor] = {}
        self._glue_reads_values = False

    def load(self, position: int) -> UnitData:
        """Inputs and targets of the unit at `position`; all units before it must be stored.

        Args:
            position: in execution order.
        """
        name = self.graph.names[position]
        unit = self.full.get_submodule(name)
        keys = self.graph.keys(name)
        targets = {key: self._allocate(shape) for key, shape in self.graph.kept_shapes(name).items()}
        for batch, (args, kwargs) in self._replays(self.full, self._full, position):
            with torch.no_grad(), self._echoes_kept(self.full, name, targets, batch):
                self._keep(targets, keys, batch, unit(*args, **kwargs))
        self._full |= targets

        inputs: list[Tensor] = []
        split: SplitArguments | None = None
        for batch, arguments in self._replays(self.quantized, self._quantized, position):
            part = split_arguments(arguments, batch.stop - batch.start, self.graph.rows.get(name))
            if split is None:
                inputs = [self.storage.allocate((len(self.samples), *x.shape[1:]), x.dtype) for x in part.inputs]
                split = part
            for stored, x in zip(inputs, part.inputs, strict=True):
                stored[batch] = x
        assert split is not None
        tree = self.graph.outputs.get(name)
        return UnitData(
            inputs,
            split.constants,
            split.spec,
            targets[name] if tree is None else tree.build(targets.__getitem__),
            self.groups,
            dtype=self.dtype,
            folded=split.folded,
            dtypes=split.dtypes,
            in_files=any(self.storage.in_file(x) for x in (*inputs, *targets.values())),
        )

    @torch.no_grad()
    def store(self, position: int, data: UnitData) -> None:
        """Run the finished quantized unit on its inputs, keep its outputs, and free what no later unit needs.

        The unit's inputs are freed too, so `data` cannot be used afterwards.
        """
        name = self.graph.names[position]
        alive = self.graph.alive_after(position)
        keys, shapes = self.graph.keys(name), self.graph.kept_shapes(name)
        if alive.intersection(shapes):
            unit = self.quantized.get_submodule(name)
            outputs = {key: self._allocate(shape) for key, shape in shapes.items() if key in alive}
            for index, batch in zip(self._batches(), data.batches(self._batches(), self.device), strict=True):
                with self._echoes_kept(self.quantized, name, outputs, index):
                    self._keep(outputs, keys, index, data.run_batch(unit, self.timestep_groups, batch))
            self._quantized |= outputs
        while data.inputs:
            self.storage.free(data.inputs.pop())
        for stored in (self._full, self._quantized):
            for done in set(stored) - alive:
                self.storage.free(stored.pop(done))

    def executions(self, position: int) -> dict[str, int]:
        """On how many samples `load` and `store` run the unit at `position`, by stream."""
        kept = self.graph.alive_after(position).intersection(self.graph.kept_shapes(self.graph.names[position]))
        return {"full_stream": len(self.samples), "quantized_stream": len(self.samples) if kept else 0}

    def _allocate(self, shape: tuple[int, ...]) -> Tensor:
        return self.storage.allocate((len(self.samples), *shape), self.dtype)

    @contextmanager
    def _echoes_kept(self, denoiser: nn.Module, name: str, stored: dict[str, Tensor], batch: slice) -> Iterator[None]:
        """Inside the context, keep what a unit's echoes return while it runs on a batch."""

        def keep(echo: str) -> Callable[..., None]:
            return lambda _module, _args, output: stored[echo].__setitem__(batch, output)

        echoes = self.graph.echoes.get(name, ())
        handles = [denoiser.get_submodule(echo).register_forward_hook(keep(echo)) for echo in echoes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, stored: dict[str, Tensor], keys: list[str], batch: slice, outputs: Outputs) -> None:
        for key, x in zip(keys, output_tensors(outputs), strict=True):
            if key in stored:
                stored[key][batch] = self.graph.kept(key, x, batch.stop - batch.start)

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self.samples), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self.samples)))

    @torch.no_grad()
    def _replays(
        self, denoiser: nn.Module, stored: dict[str, Tensor], position: int
    ) -> Iterator[tuple[slice, tuple[tuple[Any, ...], dict[str, Any]]]]:
        """The unit's arguments in one stream, batch by batch."""
        with dtype_at_hand(denoiser):
            for batch in self._batches():
                if not self._glue_reads_values:
                    try:
                        arguments = self._replayed(denoiser, stored, position, batch)
                        self._glue_reads_values = any(isinstance(x, Absent) for x in tree_leaves(arguments))
                    except (RuntimeError, NotImplementedError):
                        self._glue_reads_values = True
                if self._glue_reads_values:
                    arguments = self._replayed(denoiser, stored, position, batch)
                yield batch, arguments

    def _replayed(
        self, denoiser: nn.Module, stored: dict[str, Tensor], position: int, batch: slice
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the unit at `position` for a batch, in the stream whose outputs are given."""
        finished, name = self.graph.names[:position], self.graph.names[position]
        needed = self.graph.needs[name]
        forwards: dict[str, Callable[..., Any]] = {
            n: _once(self._stub(n, stored, batch, needed), denoiser.get_submodule(n).forward) for n in finished
        }
        echoes = (echo for n in finished for echo in self.graph.echoes.get(n, ()))
        forwards |= {echo: self._stub_of_echo(stored[echo][batch]) for echo in echoes}
        forwards[name] = _stop
        try:
            with patched_forwards(denoiser, forwards):
                self.samples[batch].predict(denoiser)
        except Stop as reached:
            return reached.args_kwargs
        raise RuntimeError(f"unit {name} was not reached; the denoiser's path must not depend on values")

    def _stub(
        self, name: str, stored: dict[str, Tensor], batch: slice, needed: frozenset[str]
    ) -> Callable[..., Outputs]:
        def output(key: str) -> Tensor:
            dtype = self.graph.output_dtypes.get(key, self.dtype)
            if key in needed:  # a copy: glue may write in place
                x = stored[key][batch].to(self.device, dtype, copy=True)
            else:
                x = self._placeholder((batch.stop - batch.start, *self.graph.output_shapes[key]), dtype)
            return self.graph.returned(key, x)

        tree = self.graph.outputs.get(name)
        return lambda *_, **__: output(name) if tree is None else tree.build(output)

    def _stub_of_echo(self, stored: Tensor) -> Callable[..., Tensor]:
        return lambda *_, **__: stored.to(self.device, self.dtype, copy=True)

    def _placeholder(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Stands for what the unit's inputs do not depend on; NaN where glue reads values anyway."""
        if self._glue_reads_values:
            return torch.full((), torch.nan, dtype=dtype, device=self.device).expand(shape)
        return absent(shape, dtype, self.device)


def _once(first: Callable[..., Any], again: Callable[..., Any]) -> Callable[..., Any]:
    """A function for the first call, and one for those after it: what a unit computes again is glue."""
    calls = iter((first,))

    def forward(*args: Any, **kwargs: Any) -> Any:
        return next(calls, again)(*args, **kwargs)

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
        dtype: of the units' outputs.
        stored: what floating-point values are stored as.
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
        shapes = graph.kept_shapes(name)
        outputs |= {key: [place(shape, dtype)] for key, shape in shapes.items()}
        read = [place(*tensor) for tensor in inputs[position]]
        for key in [key for key in shapes if key in alive]:
            outputs[key].append(place(shapes[key], dtype))
        gone = [b for n in outputs.keys() - alive for b in outputs.pop(n)]
        for booking in (*read, *gone):
            ledger.free(*booking)
    return ledger.peak
