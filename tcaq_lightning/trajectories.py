"""Calibration data: the denoiser inputs that a sampler visits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.config import SamplerConfig
from tcaq_lightning.distributed import gather, share
from tcaq_lightning.pipelines import sample


@dataclass
class Trajectories:
    """Denoiser inputs along sampler trajectories.

    Attributes:
        inputs: (S, N, C, H, W) x_t as the denoiser meets it, S denoiser calls in sampling order.
        timesteps: (S,) their timesteps.
        finals: (N, C, H, W) the samples that the trajectories end in.
    """

    inputs: Tensor
    timesteps: Tensor
    finals: Tensor

    @property
    def num_steps(self) -> int:
        """S."""
        return self.inputs.shape[0]

    @property
    def num_trajectories(self) -> int:
        """N."""
        return self.inputs.shape[1]

    def flat(self) -> tuple[Tensor, Tensor]:
        """All samples: x_t (S*N, C, H, W) and t (S*N,), the steps outermost."""
        return self.inputs.flatten(0, 1), self.timesteps.repeat_interleave(self.num_trajectories)

    def select(self, part: slice | Tensor) -> Trajectories:
        """Some of the trajectories."""
        return Trajectories(self.inputs[:, part], self.timesteps, self.finals[part])

    @staticmethod
    def join(parts: Sequence[Trajectories]) -> Trajectories:
        """Trajectories over the same timesteps, side by side."""
        inputs, finals = torch.cat([p.inputs for p in parts], dim=1), torch.cat([p.finals for p in parts])
        return Trajectories(inputs, parts[0].timesteps, finals)

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        return {"inputs": self.inputs, "timesteps": self.timesteps, "finals": self.finals}


def collect(
    denoiser: nn.Module,
    scheduler: Any,
    sampler: SamplerConfig,
    indices: Sequence[int],
    seed: int,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> Trajectories:
    """Run the sampler once for each noise and keep every denoiser input: S calls for S steps, no restarts.

    Args:
        denoiser: full-precision or quantized.
        scheduler: the pipeline's own scheduler.
        sampler: sampler settings.
        indices: numbers of the noises; the same numbers and seed give the same noise for any denoiser.
        seed: seed of the noises.
        batch_size: trajectories at a time.
        advance: told the number of trajectories just done.
    """
    parts: list[Trajectories] = []
    for start in range(0, len(indices), batch_size):
        inputs: list[Tensor] = []
        timesteps: list[Tensor] = []

        def record(_: int, t: Tensor, x: Tensor, inputs: list[Tensor] = inputs, ts: list[Tensor] = timesteps) -> None:
            inputs.append(x.cpu().clone())
            ts.append(t.cpu().clone())

        chosen = indices[start : start + batch_size]
        finals = sample(denoiser, scheduler, sampler, chosen, seed, record).cpu()
        parts.append(Trajectories(torch.stack(inputs), torch.stack(timesteps), finals))
        if advance is not None:
            advance(len(chosen))
    return Trajectories.join(parts)


def collect_together(
    denoiser: nn.Module,
    scheduler: Any,
    sampler: SamplerConfig,
    indices: Sequence[int],
    seed: int,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> Trajectories:
    """`collect` by all ranks, each a part of the noises; every rank gets all trajectories, in their order."""
    mine = share(indices)
    own = collect(denoiser, scheduler, sampler, mine, seed, batch_size, advance).tensors() if len(mine) else None
    parts = [Trajectories(**part) for part in gather(own) if part is not None]
    if advance is not None and len(mine) < len(indices):
        advance(len(indices) - len(mine))
    return Trajectories.join(parts)


def mixed(full_precision: Trajectories, quantized: Trajectories, share: float, seed: int) -> Trajectories:
    """Replace a share of the trajectories by the quantized sampler's from the same noise (METHOD section 5).

    Args:
        full_precision: N trajectories of the full-precision sampler.
        quantized: N trajectories of the quantized sampler, same noises.
        share: rho_m in [0, 1].
        seed: which trajectories are replaced is drawn from it.
    """
    count = full_precision.num_trajectories
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    replaced = torch.zeros(count, dtype=torch.bool)
    replaced[order[: round(share * count)]] = True
    pick = replaced.view(1, -1, 1, 1, 1)
    return Trajectories(
        torch.where(pick, quantized.inputs, full_precision.inputs),
        full_precision.timesteps,
        torch.where(pick[0], quantized.finals, full_precision.finals),
    )


def mismatch(quantized: Trajectories, full_precision: Trajectories) -> Tensor:
    """Relative distance of the two samplers' x_t, by denoiser call: (S,).

    ||x_t^q - x_t^fp||^2 / ||x_t^fp||^2 over all trajectories of a step   (METHOD section 5)
    """
    difference = (quantized.inputs - full_precision.inputs).flatten(1).double()
    return difference.square().sum(1) / full_precision.inputs.flatten(1).double().square().sum(1)
