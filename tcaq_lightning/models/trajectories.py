"""Calibration data: the denoiser inputs that a sampler visits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.config import SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.denoiser_calls import Call, Conditioning, Samples, watched
from tcaq_lightning.models.forwards import patched_forwards
from tcaq_lightning.models.sampling import Sampling
from tcaq_lightning.runtime.distributed.collectives import gather, share
from tcaq_lightning.runtime.one_line import one_line


@dataclass
class Trajectories:
    """Denoiser inputs along sampler trajectories.

    With classifier-free guidance a sample has several rows in each of the sampler's batches. Each row counts as a call
    of its own: first a step's first rows, then its second ones.

    Attributes:
        inputs: (S, N, C, H, W) x_t as the denoiser meets it, S denoiser calls in sampling order.
        timesteps: (S,) their timesteps.
        finals: (N, C, H, W) the images that the trajectories end in.
        conditioning: what else the denoiser takes.
        halves: rows of a sample in a batch: 2 with guidance, else 1.
    """

    inputs: Tensor
    timesteps: Tensor
    finals: Tensor
    conditioning: Conditioning = field(default_factory=Conditioning)
    halves: int = 1

    @property
    def num_steps(self) -> int:
        """S."""
        return self.inputs.shape[0]

    @property
    def num_trajectories(self) -> int:
        """N."""
        return self.inputs.shape[1]

    def flat(self) -> Samples:
        """All S*N samples, the steps outermost."""
        calls, trajectories = torch.arange(self.num_steps), torch.arange(self.num_trajectories)
        return Samples(
            self.inputs.flatten(0, 1),
            self.timesteps.repeat_interleave(self.num_trajectories),
            self.conditioning,
            calls.repeat_interleave(self.num_trajectories),
            trajectories.repeat(self.num_steps),
        )

    def at(self, calls: Tensor, trajectories: Tensor) -> Samples:
        """One sample for each pair of a call (B,) and a trajectory (B,)."""
        return Samples(self.inputs[calls, trajectories], self.timesteps[calls], self.conditioning, calls, trajectories)

    @classmethod
    def of_samples(cls, samples: Samples) -> Trajectories:
        """Samples as the calls of one trajectory, whose final image has no meaning."""
        whole = samples[slice(None)]
        assert whole.calls is not None
        assert whole.trajectories is not None
        rows = samples.conditioning.of_samples(whole.calls, whole.trajectories)
        return cls(samples.x.unsqueeze(1), samples.timesteps, samples.x[:1], rows)

    def select(self, part: slice | Tensor) -> Trajectories:
        """Some of the trajectories."""
        conditioning = self.conditioning.select(part)
        return Trajectories(self.inputs[:, part], self.timesteps, self.finals[part], conditioning, self.halves)

    @staticmethod
    def join(parts: Sequence[Trajectories]) -> Trajectories:
        """Trajectories over the same timesteps, side by side."""
        first = parts[0]
        inputs, finals = torch.cat([p.inputs for p in parts], dim=1), torch.cat([p.finals for p in parts])
        conditioning = Conditioning.side_by_side([p.conditioning for p in parts])
        return Trajectories(inputs, first.timesteps, finals, conditioning, first.halves)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For a safetensors file and a JSON-ready record beside it."""
        tensors, conditioning = self.conditioning.packed()
        own = {"inputs": self.inputs, "timesteps": self.timesteps, "finals": self.finals}
        return own | tensors, {"conditioning": conditioning, "halves": self.halves}

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], record: dict[str, Any]) -> Trajectories:
        """Undo `packed`."""
        own = {name: tensors[name] for name in ("inputs", "timesteps", "finals")}
        conditioning = Conditioning.unpacked(tensors, record["conditioning"])
        return cls(**own, conditioning=conditioning, halves=record["halves"])


class _Recorder:
    """Records the calls of a denoiser while samples are drawn."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.calls: list[Call] = []
        self.conditioning: list[Conditioning] = []

    def see(self, call: Call) -> None:
        """Record a call."""
        rows = len(call.x)
        if rows % self.samples or (self.calls and self._rows(call) != self._rows(self.calls[0])):
            raise UserError(
                f"the denoiser is called with {rows} rows for {self.samples} samples; expected the same number of rows "
                "for each sample in every step"
            )
        conditioning = Conditioning.of_call(call.arguments, rows, rows // self.samples)
        if self.conditioning and conditioning == self.conditioning[0]:
            conditioning = self.conditioning[0]
        else:
            conditioning = conditioning.copied()
        self.conditioning.append(conditioning)
        self.calls.append(Call(call.x.cpu().clone(), call.timestep.cpu().clone(), {}))

    def trajectories(self, finals: Tensor) -> Trajectories:
        """The recorded calls as trajectories."""
        halves = self._rows(self.calls[0])
        inputs = [x for call in self.calls for x in call.x.view(halves, self.samples, *call.x.shape[1:])]
        timesteps = torch.stack([call.timestep.reshape(-1)[0] for call in self.calls]).repeat_interleave(halves)
        conditioning = Conditioning.along_steps(self.conditioning)
        return Trajectories(torch.stack(inputs), timesteps, finals.cpu(), conditioning, halves)

    def _rows(self, call: Call) -> int:
        return len(call.x) // self.samples


def collect(
    denoiser: nn.Module,
    sampling: Sampling,
    sampler: SamplerConfig,
    indices: Sequence[int],
    seed: int,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> Trajectories:
    """Run the sampler once for each noise and keep every denoiser input: S calls for S steps, no restarts.

    Args:
        denoiser: full-precision or quantized.
        sampling: how the pipeline is sampled.
        sampler: sampler settings.
        indices: numbers of the noises; the same numbers and seed give the same noise for any denoiser.
        seed: seed of the noises.
        batch_size: trajectories at a time.
        advance: told the number of trajectories just done.
    """
    parts: list[Trajectories] = []
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        recorder = _Recorder(len(chosen))
        with watched(denoiser, recorder.see):
            finals = sampling.sample(denoiser, sampler, chosen, seed)
        parts.append(recorder.trajectories(finals))
        if advance is not None:
            advance(len(chosen))
    return Trajectories.join(parts)


def probe(
    denoiser: nn.Module, sampling: Sampling, sampler: SamplerConfig, key: str = "calibration.sampler"
) -> Trajectories:
    """Run two trajectories with only one call of the denoiser: every later prediction is zero.

    The result tells which calls there are, at which timesteps and with which arguments. The inputs of the first calls
    are those of real trajectories.

    Args:
        denoiser: full precision.
        sampling: how the pipeline is sampled.
        sampler: sampler settings.
        key: config key that errors name.

    Raises:
        UserError: the denoiser cannot be sampled like this.
    """
    sampling.check(denoiser, sampler, key)
    first: list[Any] = []

    def predict(*args: Any, **kwargs: Any) -> Any:
        if not first:
            first.append(type(denoiser).forward(denoiser, *args, **kwargs))
            return first[0]
        return _zero_like(first[0])

    try:
        with patched_forwards(denoiser, {"": predict}):
            found = collect(denoiser, sampling, sampler, [0, 1], 0, 2)
    except UserError:
        raise
    except Exception as error:  # pipelines, denoisers and schedulers raise whatever they like
        raise UserError(
            f"{key}: {type(denoiser).__name__} cannot be sampled in {sampler.num_steps} steps like this: "
            f"{one_line(error)}"
        ) from error
    if not first[0][0].isfinite().all():
        raise UserError(f"model.path: {type(denoiser).__name__} predicts NaN or infinity; expected finite values")
    shape, predicted = tuple(found.inputs.shape[2:]), tuple(first[0][0].shape[1:])
    if predicted != shape and predicted != (2 * shape[0], *shape[1:]):  # beside variances
        raise UserError(
            f"model.path: expected a {type(denoiser).__name__} whose prediction is like x_t, {shape}, got {predicted}; "
            "one that takes further channels, such as those of an image to inpaint, is not supported"
        )
    return found


def _zero_like(prediction: Any) -> Any:
    """A denoiser's return value, a tuple or diffusers' output, with zeros in it."""
    zero = torch.zeros_like(prediction[0])
    return (zero,) if isinstance(prediction, tuple) else type(prediction)(sample=zero)


def collect_together(
    collect_some: Callable[[Sequence[int]], Trajectories],
    indices: Sequence[int],
    advance: Callable[[int], None] | None = None,
) -> Trajectories:
    """Collect on all ranks, each its share of the noises; every rank gets all trajectories, in order.

    Args:
        collect_some: collects the trajectories of the noises whose numbers it is given, such as `collect` does.
        indices: numbers of all noises.
        advance: told the number of trajectories that other ranks collect.
    """
    mine = share(indices)
    own = collect_some(mine).packed() if len(mine) else None
    parts = [Trajectories.unpacked(*part) for part in gather(own) if part is not None]
    if advance is not None and len(mine) < len(indices):
        advance(len(indices) - len(mine))
    return Trajectories.join(parts)
