"""The graph of units: their order, what each reads, and how their outputs form what they return."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from tcaq_lightning.errors import UserError
from tcaq_lightning.models.denoiser_calls import batch_of, timestep_name
from tcaq_lightning.models.families import LAYERS_WITH_WEIGHTS
from tcaq_lightning.models.forwards import patched_forwards
from tcaq_lightning.models.repeated_calls import CalledAgain
from tcaq_lightning.models.units import find_units


@dataclass(frozen=True)
class OutputTree:
    """How a unit's output tensors form what it returns.

    Attributes:
        keys: name of each leaf's output; None for a leaf that is no tensor.
        constants: value of each leaf that is no tensor, else None.
        spec: how the leaves form what is returned.
    """

    keys: tuple[str | None, ...]
    constants: tuple[Any, ...]
    spec: TreeSpec

    def build(self, tensor_of: Callable[[str], Tensor]) -> Any:
        """What the unit returns, with the given tensors in it."""
        leaves = [c if k is None else tensor_of(k) for k, c in zip(self.keys, self.constants, strict=True)]
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class UnitGraph:
    """Units in execution order, and which earlier units' outputs each one's inputs are computed from.

    A unit's first output has the unit's name, further ones have `#1`, `#2`, … after it.

    Attributes:
        names: execution order.
        needs: for each unit, the outputs that its inputs depend on through glue (skips, concatenations).
        output_shapes: per output, its shape without the batch axis. Where a sample has k > 1 rows, k comes first.
        readers: units that read the denoiser's noisy sample itself.
        direct: layers that read their unit's input itself, with no norm in between.
        outputs: per unit, how they form what it returns; left out of a unit that returns its only output.
        output_dtypes: per output.
        rows: per unit, for each of its flattened arguments, rows per sample; 0 of what is the same for all samples.
        own_shapes: of outputs that are kept in another shape than they are returned in, that shape of one sample, its
            number of rows first.
        echoes: modules within a unit that the denoiser calls again outside of it, on the same arguments, with the shape
            of their output without the batch axis, by unit: what they return there is what they returned in the unit.
    """

    names: list[str]
    needs: dict[str, frozenset[str]]
    output_shapes: dict[str, tuple[int, ...]]
    readers: frozenset[str] = frozenset()
    direct: frozenset[str] = frozenset()
    outputs: dict[str, OutputTree] = field(default_factory=dict)
    output_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    own_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    echoes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)

    def keys(self, name: str) -> list[str]:
        """Names of a unit's outputs."""
        return [key for key in self.outputs[name].keys if key is not None] if name in self.outputs else [name]

    def kept(self, key: str, output: Tensor, batch: int) -> Tensor:
        """An output of B samples in the shape that it is kept in, (B, ...)."""
        return output if key not in self.own_shapes else output.reshape(batch, *self.output_shapes[key])

    def returned(self, key: str, kept: Tensor) -> Tensor:
        """A kept output in the shape that the unit returns."""
        if key not in self.own_shapes:
            return kept
        rows, *rest = self.own_shapes[key]
        return kept.reshape(kept.shape[0] * rows, *rest)

    def alive_after(self, position: int) -> set[str]:
        """Outputs of the first `position + 1` units that a later unit needs, and echoes that it may need."""
        finished, later = self.names[: position + 1], self.names[position + 1 :]
        done = {key for name in finished for key in self.keys(name)}
        echoes = {echo for name in finished for echo in self.echoes.get(name, ())} if later else set()
        return {n for name in later for n in self.needs[name] if n in done} | echoes

    def kept_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Shapes, without the batch axis, of all that is kept of a unit's run: its outputs and echoes."""
        return {key: self.output_shapes[key] for key in self.keys(name)} | self.echoes.get(name, {})


def trace_units(denoiser: nn.Module, run: Callable[[], Any], sample: Tensor | None = None) -> UnitGraph:
    """Record the units' execution order and dependencies in one forward pass.

    Every unit's output is cut off as a leaf that requires grad; walking back from a unit's inputs then reaches exactly
    the outputs they are computed from. A second pass, of glue alone and on one sample less, tells what of a unit's
    arguments belongs to the samples, and how many rows each has: sizes alone may agree by chance.

    Args:
        denoiser: the full-precision denoiser.
        run: calls it on a small batch of at least two samples.
        sample: the noisy sample of that batch, if its readers are to be known.

    Raises:
        UserError: a unit returns something else than floating-point tensors.
    """
    names = find_units(denoiser)
    trace = _Trace(denoiser, names, sample)
    with trace.recording():
        run()
    called = CalledAgain(denoiser, names)
    with called.watching():
        rows = _rows_per_sample(denoiser, names, trace, run) if trace.batch > 1 else {}
    return UnitGraph(
        trace.names,
        trace.needs,
        trace.shapes,
        frozenset(trace.readers),
        frozenset(trace.direct),
        trace.outputs,
        {key: leaf.dtype for key, leaf in trace.leaves.items()},
        rows,
        trace.own_shapes,
        called.echoes(run, trace.batch),
    )


class _Trace:
    """The first pass of `trace_units`: records what the units read and return."""

    def __init__(self, denoiser: nn.Module, units: list[str], sample: Tensor | None) -> None:
        self.denoiser, self.units, self.sample = denoiser, units, sample
        self.batch = 0
        self.names: list[str] = []
        self.needs: dict[str, frozenset[str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.outputs: dict[str, OutputTree] = {}
        self.arguments: dict[str, list[Any]] = {}  # shapes of the tensors among them
        self.leaves: dict[str, Tensor] = {}  # kept: ids stay unique
        self.readers: set[str] = set()
        self.direct: set[str] = set()
        self.own_shapes: dict[str, tuple[int, ...]] = {}
        self._handed: list[Tensor] = []
        self._owner: dict[int, str] = {}
        self._layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, LAYERS_WITH_WEIGHTS)}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the denoiser's call within."""
        handles = [m.register_forward_pre_hook(self._watch(n)) for n, m in self._layers.items()]
        handles.append(self.denoiser.register_forward_pre_hook(self._enter, with_kwargs=True))
        forwards = {n: self._traced(n, self.denoiser.get_submodule(n).forward) for n in self.units}
        try:
            with torch.enable_grad(), patched_forwards(self.denoiser, forwards):
                if self.sample is not None:
                    self.sample.requires_grad_()
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.batch = batch_size(_module, args, kwargs)
        torch.set_grad_enabled(True)  # dependencies are read from the graph, even if `run` has switched it off

    def _watch(self, name: str) -> Callable[..., None]:
        def receive(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and any(args[0] is x for x in self._handed):
                self.direct.add(name)

        return receive

    def _traced(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if name in self.needs:  # it runs again: what it computes then is glue
                return original(*args, **kwargs)
            leaves = tree_leaves((args, kwargs))
            inputs = [x for x in leaves if isinstance(x, Tensor)]
            sources = {i for x in inputs for i in _leaf_ids(x)}
            self.arguments[name] = [x.shape if isinstance(x, Tensor) else None for x in leaves]
            self.needs[name] = frozenset(self._owner[i] for i in sources if i in self._owner)
            if self.sample is not None and id(self.sample) in sources:
                self.readers.add(name)
            self.names.append(name)
            self._handed[:] = inputs
            if name in self._layers:  # its own hook ran before it was handed anything
                self.direct.add(name)
            with torch.no_grad():
                output = original(*args, **kwargs)
            return self._cut_off(name, output)

        return forward

    def _cut_off(self, name: str, output: Any) -> Any:
        """The output with leaves in place of its tensors."""
        values, spec = tree_flatten(output)
        tensors = [i for i, x in enumerate(values) if isinstance(x, Tensor)]
        wrong = [f"a tensor of {values[i].dtype}" for i in tensors if not values[i].is_floating_point()]
        if wrong or not tensors:
            got = wrong[0] if wrong else type(output).__name__
            raise UserError(f"unit {name} returns {got}, expected one or several floating-point tensors")
        keys = {i: f"{name}#{number}" if number else name for number, i in enumerate(tensors)}
        for i, key in keys.items():
            x = values[i]
            rows = self._rows(name, x)
            self.shapes[key] = shape = kept_shape(self.denoiser.get_submodule(name), rows, tuple(x.shape[1:]))
            if (rows, *shape) != (1, *x.shape[1:]):
                self.own_shapes[key] = rows, *x.shape[1:]
            self.leaves[key] = leaf = x.detach().requires_grad_()
            self._owner[id(leaf)] = key
            values[i] = leaf * 1.0  # glue may write in place, which a leaf forbids
        if not isinstance(output, Tensor):
            constants = tuple(None if i in keys else x for i, x in enumerate(values))
            self.outputs[name] = OutputTree(tuple(keys.get(i) for i in range(len(values))), constants, spec)
        return tree_unflatten(values, spec)

    def _rows(self, name: str, output: Tensor) -> int:
        if not self.batch:  # `run` calls something else than the denoiser
            return 1
        rows, rest = divmod(output.shape[0], self.batch) if output.ndim else (0, 1)
        if rest:
            raise UserError(
                f"unit {name} returns a tensor of shape {tuple(output.shape)} for {self.batch} samples, expected one "
                f"row a sample, or several; such a denoiser is not supported"
            )
        return rows


def batch_size(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Number of samples that a denoiser is called on."""
    names = list(inspect.signature(denoiser.forward).parameters)
    named = dict(zip(names, args, strict=False)) | kwargs
    samples, timestep = named.get(names[0]), named.get(timestep_name(names))
    return 0 if samples is None else batch_of(samples, timestep)[0]


def kept_shape(unit: nn.Module, rows: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What a sample's output is kept as: (C,), (T, C), (C, H, W) or (k, C, H, W), from which its channels are known.

    Args:
        unit: what returns it. Channels are last behind a linear layer, and first behind a convolution.
        rows: number k of a sample's rows.
        shape: of a row: (C,), (T, C), (C, H, W), (C, F, H, W), or (C, L) of a convolution.

    >>> kept_shape(nn.Conv3d(1, 2, 1), 1, (2, 5, 4, 3)), kept_shape(nn.Identity(), 6, (7, 8))
    ((2, 20, 3), (42, 8))
    """
    if isinstance(unit, nn.Linear) and len(shape) > 1:
        return rows * math.prod(shape[:-1]), shape[-1]
    if isinstance(unit, (nn.Conv1d, nn.ConvTranspose1d)) and len(shape) == 2:
        shape = shape[0], 1, shape[1]
    if len(shape) == 4:
        shape = shape[0], shape[1] * shape[2], shape[3]
    if len(shape) == 2 and rows > 1:
        return rows * shape[0], shape[1]
    if len(shape) > 4:
        return rows * math.prod(shape[:-1]), shape[-1]
    return (shape if rows == 1 else (rows, *shape)) or (1,)


def _rows_per_sample(
    denoiser: nn.Module, units: list[str], trace: _Trace, run: Callable[[], Any]
) -> dict[str, tuple[int, ...]]:
    """The second pass of `trace_units`, on all samples but the last, the units' outputs at hand from the first."""
    fewer = trace.batch - 1
    rows: dict[str, tuple[int, ...]] = {}

    def cut(x: Any) -> Any:
        rows = x.shape[0] if isinstance(x, Tensor) and x.ndim else len(x) if isinstance(x, list) else 0
        return x[:fewer] if rows == trace.batch else x

    def shorten(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        def is_list(x: Any) -> bool:
            return isinstance(x, list) and len(x) == trace.batch

        return tree_map(cut, args, is_leaf=is_list), tree_map(cut, kwargs, is_leaf=is_list)

    def stub(name: str) -> Callable[..., Any]:
        original = denoiser.get_submodule(name).forward

        def part(key: str) -> Tensor:
            leaf = trace.leaves[key].detach()
            return leaf[: leaf.shape[0] // trace.batch * fewer].clone()

        def forward(*args: Any, **kwargs: Any) -> Any:
            if name in rows:
                return original(*args, **kwargs)
            found = zip(trace.arguments[name], tree_leaves((args, kwargs)), strict=True)
            rows[name] = tuple(lost(before, x) for before, x in found)
            return trace.outputs[name].build(part) if name in trace.outputs else part(name)

        return forward

    def lost(before: Any, x: Any) -> int:
        """Rows that went with the sample, if all rows are so many a sample.

        What is not there without it, as a mask of prompts that differ in length, is taken for a row of each.
        """
        if not before or not isinstance(x, Tensor):
            return before[0] // trace.batch if before and before[0] % trace.batch == 0 else 0
        difference: int = before[0] - x.shape[0]
        return difference if difference * trace.batch == before[0] else 0

    handle = denoiser.register_forward_pre_hook(shorten, with_kwargs=True)
    try:
        with torch.no_grad(), patched_forwards(denoiser, {name: stub(name) for name in units}):
            run()
    except (IndexError, RuntimeError, ValueError):  # an argument says of each sample where it is: none can be left out
        rows = {
            name: tuple(_by_size(shape, trace.batch) for shape in shapes) for name, shapes in trace.arguments.items()
        }
    finally:
        handle.remove()
    return rows


def _by_size(shape: Any, batch: int) -> int:
    """Rows per sample of an argument of that shape, by its size alone."""
    return int(shape[0] // batch) if shape and shape[0] % batch == 0 else 0


def _leaf_ids(x: Tensor) -> set[int]:
    """Ids of the leaves that `x` was computed from."""
    if x.grad_fn is None:
        return {id(x)}
    found: set[int] = set()
    seen: set[Any] = set()
    stack: list[Any] = [x.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(next_node for next_node, _ in node.next_functions if next_node is not None)
    return found
