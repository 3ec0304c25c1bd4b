"""Calls of a denoiser, whatever it takes: x_t, t, and the conditioning that goes with each of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten, treespec_dumps, treespec_loads

from tcaq_lightning.errors import UserError

SHARED = ("img_ids", "txt_ids")
"""Tensor arguments that are the same for all rows of a batch, whatever their first axis: Flux's positions."""


TIMESTEPS = ("timestep", "timesteps", "t", "timestep_ratio", "vision_timesteps", "decoder_noise_time", "bb_ca_time")
"""Names that denoisers give to their timestep."""


def timestep_name(names: Sequence[str]) -> str:
    """Which argument of a denoiser is the timestep; the second one where none is called so.

    >>> timestep_name(["x", "t", "cap_feats"]), timestep_name(["sample", "noise_level"])
    ('t', 'noise_level')
    """
    return next((name for name in TIMESTEPS if name in names), list(names)[min(1, len(names) - 1)])


def batch_of(samples: Any, timestep: Any) -> tuple[int, torch.device]:
    """Number of samples and their device: of a tensor, of a list with one for each, or of what else there is."""
    if isinstance(samples, Tensor) and samples.ndim > 1 and samples.is_floating_point():
        return samples.shape[0], samples.device
    if isinstance(timestep, Tensor) and timestep.ndim:
        return timestep.shape[0], timestep.device
    tensors = [x for x in tree_leaves(samples) if isinstance(x, Tensor)]
    several = isinstance(samples, (list, tuple))
    return (len(samples) if several else tensors[0].shape[0]), tensors[0].device


@dataclass(frozen=True)
class Conditioning:
    """A denoiser's arguments beside x_t and t, for all calls of some trajectories.

    Attributes:
        spec: how the leaves form the keyword arguments.
        tensors: by position among the leaves, (K, N, ...) of N trajectories: call s takes row s % K, where K is the
            number of rows of a sample in a batch (2 with guidance) if all steps have the same ones.
        constants: by position, what is the same in every call.
    """

    spec: TreeSpec = field(default_factory=lambda: tree_flatten({})[1])
    tensors: dict[int, Tensor] = field(default_factory=dict)
    constants: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def of_call(cls, arguments: dict[str, Any], rows: int, halves: int = 1) -> Conditioning:
        """The conditioning of one call.

        Args:
            arguments: keyword arguments.
            rows: rows B of the batch.
            halves: rows k of each sample. The batch has B / k samples: first rows of all samples, then second rows.

        Raises:
            UserError: an argument is neither tensor, number nor text.
        """
        shared = {id(arguments[name]) for name in SHARED if name in arguments}
        leaves, spec = tree_flatten(arguments)
        tensors: dict[int, Tensor] = {}
        constants: dict[int, Any] = {}
        for position, leaf in enumerate(leaves):
            batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows and id(leaf) not in shared
            if batched:
                tensors[position] = leaf.reshape(halves, rows // halves, *leaf.shape[1:])
            elif leaf is None or isinstance(leaf, (bool, int, float, str, Tensor)):
                constants[position] = leaf
            else:
                raise UserError(
                    f"the denoiser is called with a {type(leaf).__name__} among {', '.join(arguments)}; expected "
                    "tensors, numbers and text alone: give `quantize` a pipeline whose denoiser takes those"
                )
        return cls(spec, tensors, constants)

    def rows(self, calls: Tensor, trajectories: Tensor, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of a batch.

        Args:
            calls: (B,) numbers of the rows' calls.
            trajectories: (B,) numbers of the rows' trajectories.
            device: where the tensors go.
        """
        leaves: list[Any] = []
        for position in range(len(self.tensors) + len(self.constants)):
            if position in self.tensors:
                stored = self.tensors[position]
                leaves.append(stored[calls % len(stored), trajectories].to(device))
            else:
                constant = self.constants[position]
                leaves.append(constant.to(device) if isinstance(constant, Tensor) else constant)
        arguments: dict[str, Any] = tree_unflatten(leaves, self.spec)
        return arguments

    def of_samples(self, calls: Tensor, trajectories: Tensor) -> Conditioning:
        """The conditioning of single samples (B,), as calls of one trajectory."""
        rows = {i: x[calls % len(x), trajectories].unsqueeze(1) for i, x in self.tensors.items()}
        return Conditioning(self.spec, rows, self.constants)

    def select(self, part: slice | Tensor) -> Conditioning:
        """The conditioning of some trajectories."""
        return Conditioning(self.spec, {i: x[:, part] for i, x in self.tensors.items()}, self.constants)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Conditioning)
            and self.spec == other.spec
            and _equal(self.tensors, other.tensors)
            and _equal(self.constants, other.constants)
        )

    __hash__ = None  # type: ignore[assignment]

    def copied(self) -> Conditioning:
        """The same values on the CPU, in memory of their own."""
        constants = {i: x.cpu().clone() if isinstance(x, Tensor) else x for i, x in self.constants.items()}
        return Conditioning(self.spec, {i: x.cpu().clone() for i, x in self.tensors.items()}, constants)

    @staticmethod
    def along_steps(parts: Sequence[Conditioning]) -> Conditioning:
        """The conditioning of successive calls, kept once if all calls have the same."""
        if all(part == parts[0] for part in parts[1:]):
            return parts[0]
        return _concatenated(parts, axis=0)

    @staticmethod
    def side_by_side(parts: Sequence[Conditioning]) -> Conditioning:
        """The conditioning of several groups of trajectories together."""
        return _concatenated(parts, axis=1)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For a safetensors file and a JSON-ready record beside it."""
        tensors = {f"conditioning.{i}": x for i, x in self.tensors.items()}
        tensors |= {f"constant.{i}": x for i, x in self.constants.items() if isinstance(x, Tensor)}
        values = {str(i): x for i, x in self.constants.items() if not isinstance(x, Tensor)}
        return tensors, {"spec": treespec_dumps(self.spec), "constants": values}

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], record: dict[str, Any]) -> Conditioning:
        """Undo `packed`."""

        def numbered(prefix: str) -> dict[int, Any]:
            return {int(k.removeprefix(prefix)): x for k, x in tensors.items() if k.startswith(prefix)}

        values = {int(i): x for i, x in record["constants"].items()}
        return cls(treespec_loads(record["spec"]), numbered("conditioning."), numbered("constant.") | values)


def _equal(a: dict[int, Any], b: dict[int, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(
        torch.equal(x, y.to(x.device))
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else type(x) is type(y) and x == y
        for x, y in ((a[k], b[k]) for k in a)
    )


def _concatenated(parts: Sequence[Conditioning], axis: int) -> Conditioning:
    first = parts[0]
    if any(part.spec != first.spec or not _equal(part.constants, first.constants) for part in parts):
        raise UserError(
            "the denoiser is called with other arguments from step to step; expected the same ones, in value or by row"
        )
    if axis == 1:  # some parts may have rows for every step, others the same for all steps
        length = max((len(x) for part in parts for x in part.tensors.values()), default=1)
        parts = [
            Conditioning(p.spec, {i: x[torch.arange(length) % len(x)] for i, x in p.tensors.items()}, p.constants)
            for p in parts
        ]
    tensors = {i: torch.cat([part.tensors[i] for part in parts], dim=axis) for i in first.tensors}
    return Conditioning(first.spec, tensors, first.constants)


@dataclass(frozen=True)
class Samples:
    """Inputs of a denoiser, one sample after the other.

    Attributes:
        x: (N, ...) noisy samples x_t.
        timesteps: (N,) their timesteps.
        conditioning: other arguments, by call and trajectory.
        calls: (N,) the call that each sample takes them from; None is the first one.
        trajectories: (N,) the trajectory that each sample takes them from; None numbers them through.
    """

    x: Tensor
    timesteps: Tensor
    conditioning: Conditioning = field(default_factory=Conditioning)
    calls: Tensor | None = None
    trajectories: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | Tensor) -> Samples:
        """Some of the samples."""
        numbers = torch.arange(len(self))
        calls = torch.zeros_like(numbers) if self.calls is None else self.calls
        trajectories = numbers if self.trajectories is None else self.trajectories
        return Samples(self.x[index], self.timesteps[index], self.conditioning, calls[index], trajectories[index])

    def to(self, device: torch.device) -> Samples:
        """The same samples, with x copied to a device."""
        x = self.x.to(device, copy=True)
        return Samples(x, self.timesteps, self.conditioning, self.calls, self.trajectories)

    def conditioning_bytes(self) -> int:
        """Bytes of one trajectory's conditioning."""
        return sum(x[:, 0].nbytes for x in self.conditioning.tensors.values())

    def cycled(self, count: int) -> Samples:
        """`count` samples: these, repeated."""
        return self[torch.arange(count) % len(self)]

    def arguments(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a denoiser's call with all samples."""
        all_of_them = self[slice(None)]
        assert all_of_them.calls is not None
        assert all_of_them.trajectories is not None
        conditioning = self.conditioning.rows(all_of_them.calls, all_of_them.trajectories, device)
        return (self.x.to(device),), {"timestep": self.timesteps.to(device), "return_dict": False, **conditioning}

    def predict(self, denoiser: nn.Module) -> Tensor:
        """The denoiser's prediction for all samples."""
        args, kwargs = self.arguments(next(denoiser.parameters()).device)
        prediction: Tensor = denoiser(*args, **kwargs)[0]
        return prediction


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        x: (B, ...) noisy samples x_t.
        timestep: scalar or (B,).
        arguments: other arguments that are not None.
    """

    x: Tensor
    timestep: Tensor
    arguments: dict[str, Any]


def split_call(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """What a denoiser is called with, by meaning.

    Args:
        denoiser: the denoiser.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        UserError: its first argument is no tensor, or it has no `timestep`.
    """
    parameters = inspect.signature(type(denoiser).forward).parameters
    names = [n for n, p in parameters.items() if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}][1:]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    arguments.pop("return_dict", None)
    x, timestep = arguments.pop(names[0], None), arguments.pop("timestep", None)
    if not isinstance(x, Tensor) or timestep is None:
        raise UserError(
            f"{type(denoiser).__name__}.forward takes {', '.join(names)}; expected the noisy sample first, and timestep"
        )
    return Call(x, torch.as_tensor(timestep), {k: v for k, v in arguments.items() if v is not None})


@contextmanager
def watched(denoiser: nn.Module, see: Callable[[Call], None]) -> Iterator[None]:
    """Have `see` called before each call of the denoiser."""

    def receive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(split_call(module, args, kwargs))

    handle = denoiser.register_forward_pre_hook(receive, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
