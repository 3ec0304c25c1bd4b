"""A quantized denoiser's forward: it says which timestep groups its quantizers compute for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from tcaq_lightning.models.denoiser_calls import batch_of, timestep_name
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.provided import provide, withdraw


class GroupedForward:
    """What `group` gives to a denoiser: whoever calls it, its forward finds the groups of the samples first."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's own forward, within the groups of its `timestep` argument."""
        grouping: Grouping | None = self.__dict__.get("_grouping")
        if grouping is None:  # another instance that somebody made of this one's class
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return grouping.run(super().forward, args, kwargs)  # type: ignore[misc]

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint
    ) -> None:
        """Where diffusers' `enable_gradient_checkpointing` ends up: what is computed anew is of the same groups."""
        grouping: Grouping | None = self.__dict__.get("_grouping")
        if grouping is not None:
            gradient_checkpointing_func = Checkpoint(gradient_checkpointing_func, grouping.groups)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)  # type: ignore[misc]


class Grouping:
    """How a denoiser's timestep groups follow from the arguments of its call.

    Args:
        groups: that all its quantizers share.
        forward: of the denoiser; it takes the samples first, and the timestep not always second.
    """

    def __init__(self, groups: TimestepGroups, forward: Callable[..., Any]) -> None:
        names = list(inspect.signature(forward).parameters)
        self.groups, self.first = groups, names[0]
        self.timestep = timestep_name(names)
        self.position = names.index(self.timestep)

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `forward` within the groups of its arguments."""
        samples: Any = args[0] if args else kwargs.get(self.first)
        timestep = kwargs.get(self.timestep, args[self.position] if len(args) > self.position else None)
        if samples is None or timestep is None:
            return forward(*args, **kwargs)  # which says what is missing
        with self.groups.using(*self.groups.of_batch(timestep, *batch_of(samples, timestep))):
            return forward(*args, **kwargs)


class Checkpoint:
    """Gradient checkpointing of a denoiser's parts: the backward pass computes them anew outside of its forward.

    Args:
        function: called as `function(module, *args)`.
        groups: of the denoiser.
    """

    def __init__(self, function: Callable[..., Any], groups: TimestepGroups) -> None:
        self.function, self.groups = function, groups

    def __call__(self, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's result, of the groups of now whenever it is computed."""
        running = self.groups.running

        def compute(*args: Any, **kwargs: Any) -> Any:
            with self.groups.using(*running):
                return module(*args, **kwargs)

        return self.function(compute, *args, **kwargs)


def group(denoiser: nn.Module, groups: TimestepGroups) -> None:
    """Have a denoiser's forward say the timestep groups of its samples, in place.

    Args:
        denoiser: takes the samples first and a `timestep`.
        groups: that all its quantizers share.
    """
    denoiser.__dict__["_grouping"] = Grouping(groups, denoiser.forward)
    provide(denoiser, GroupedForward)


def ungroup(denoiser: nn.Module) -> None:
    """Undo `group`."""
    denoiser.__dict__.pop("_grouping", None)
    withdraw(denoiser, GroupedForward)


@contextmanager
def grouped(denoiser: nn.Module, groups: TimestepGroups) -> Iterator[None]:
    """A denoiser after `group` within, and as it was afterwards."""
    group(denoiser, groups)
    try:
        yield
    finally:
        ungroup(denoiser)
