"""Units of reconstruction: which modules they are, in which order they run, and what each needs of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tcaq_lightning.errors import UserError

BLOCKS: dict[type[nn.Module], str | None] = {
    ResnetBlock2D: "conv2",
    Attention: "to_out.0",
    BasicTransformerBlock: "ff.net.2",
    TimestepEmbedding: "linear_2",
}
"""Modules that are reconstructed whole (BRECQ, Li et al. 2021), with the layer whose output enters the module's output
with factor 1 / (the module's rescaling): a shift of that layer's bias shifts the block's output. Extend to add one."""


def output_layer(unit: nn.Module, name: str) -> tuple[str, float] | None:
    """Name (within the denoiser) and inverse factor of the layer that shifts the unit's output, if there is one."""
    for kind, inner in BLOCKS.items():
        if isinstance(unit, kind):
            scale = float(getattr(unit, "output_scale_factor", getattr(unit, "rescale_output_factor", 1.0)))
            return (f"{name}.{inner}", scale) if inner is not None else None
    return name, 1.0


def find_units(denoiser: nn.Module, layers: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)) -> list[str]:
    """Names of the units: blocks, and layers with weights outside of any, in definition order."""
    units: list[str] = []

    def visit(module: nn.Module, name: str) -> None:
        if isinstance(module, (*BLOCKS, *layers)):
            units.append(name)
            return
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)

    visit(denoiser, "")
    return units


@dataclass(frozen=True)
class UnitGraph:
    """Units in execution order, and which earlier units' outputs each one's inputs are computed from.

    Attributes:
        names: execution order.
        needs: for each unit, the units whose outputs its inputs depend on through glue (skips, concatenations).
        output_shapes: per unit, the output's shape without the batch axis.
        readers: units that read the denoiser's noisy sample itself.
        direct: layers that read their unit's input itself, with no norm in between.
    """

    names: list[str]
    needs: dict[str, frozenset[str]]
    output_shapes: dict[str, tuple[int, ...]]
    readers: frozenset[str] = frozenset()
    direct: frozenset[str] = frozenset()

    def alive_after(self, position: int) -> set[str]:
        """Units among the first `position + 1` whose outputs some later unit still needs."""
        done = set(self.names[: position + 1])
        return {n for later in self.names[position + 1 :] for n in self.needs[later] if n in done}


class Stop(Exception):  # noqa: N818 - not an error: it ends a replay at the unit that was waited for
    """Carries the arguments of the unit at which a replay ends."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_kwargs = (args, kwargs)


@contextmanager
def patched_forwards(denoiser: nn.Module, forwards: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of named modules for a while."""
    modules = [denoiser.get_submodule(name) for name in forwards]
    for module, forward in zip(modules, forwards.values(), strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def trace_units(denoiser: nn.Module, run: Callable[[], Any], sample: Tensor | None = None) -> UnitGraph:
    """Record the units' execution order and dependencies in one forward pass.

    Every unit's output is cut off as a leaf that requires grad; walking back from a unit's inputs then reaches exactly
    the outputs they are computed from.

    Args:
        denoiser: the full-precision denoiser.
        run: calls it on a small batch.
        sample: the noisy sample of that batch, if its readers are to be known.

    Raises:
        UserError: a unit runs more than once or returns something else than one tensor.
    """
    names: list[str] = []
    needs: dict[str, frozenset[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    readers: set[str] = set()
    direct: set[str] = set()
    handed: list[Tensor] = []
    owner: dict[int, str] = {}
    leaves: list[Tensor] = []

    def traced(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if name in needs:
                raise UserError(f"unit {name} runs more than once in a forward pass; such a denoiser is not supported")
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            sources = {i for x in inputs for i in _leaf_ids(x)}
            needs[name] = frozenset(owner[i] for i in sources if i in owner)
            if sample is not None and id(sample) in sources:
                readers.add(name)
            names.append(name)
            handed[:] = inputs
            if name in layers:  # its own hook ran before it was handed anything
                direct.add(name)
            with torch.no_grad():
                output = original(*args, **kwargs)
            if not isinstance(output, Tensor):
                raise UserError(f"unit {name} returns {type(output).__name__}, expected one tensor")
            shapes[name] = tuple(output.shape[1:])
            leaf = output.detach().requires_grad_()
            owner[id(leaf)] = name
            leaves.append(leaf)  # keeps ids unique
            return leaf * 1.0  # glue may write in place, which a leaf forbids

        return forward

    def watch(name: str) -> Callable[..., None]:
        def receive(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if any(args[0] is x for x in handed):
                direct.add(name)

        return receive

    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    handles = [m.register_forward_pre_hook(watch(n)) for n, m in layers.items()]
    forwards = {n: traced(n, denoiser.get_submodule(n).forward) for n in find_units(denoiser)}
    with torch.enable_grad(), patched_forwards(denoiser, forwards):
        if sample is not None:
            sample.requires_grad_()
        run()
    for handle in handles:
        handle.remove()
    return UnitGraph(names, needs, shapes, frozenset(readers), frozenset(direct))


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
