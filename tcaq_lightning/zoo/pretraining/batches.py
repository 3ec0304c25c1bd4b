"""Which data a training step sees, as a function of (seed, step): a resumed run sees the same."""

from __future__ import annotations

import torch
from torch import Tensor

from tcaq_lightning.runtime.seeds import derive


def batch_indices(num_images: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which images a step sees: one permutation an epoch, a function of (seed, step) alone.

    Args:
        num_images: size of the data set.
        batch_size: images a step; a batch may straddle two epochs.
        step: number of the step, from 0.
        seed: seed of the permutations.

    Returns:
        int64 (batch_size,).

    >>> torch.cat([batch_indices(6, 2, step, seed=0) for step in range(3)]).sort().values.tolist()
    [0, 1, 2, 3, 4, 5]
    """
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    parts = []
    for epoch in range(int(positions[0]) // num_images, int(positions[-1]) // num_images + 1):
        permutation = torch.randperm(num_images, generator=generator(seed, epoch, stream=0))
        parts.append(permutation[positions[positions // num_images == epoch] % num_images])
    return torch.cat(parts)


def stratified_timesteps(batch_size: int, num_timesteps: int, rng: torch.Generator) -> Tensor:
    """Uniform timesteps spread evenly over a batch, which lowers the variance of the loss.

    t_i = floor(T * ((u + i / B) mod 1)), u ~ U(0, 1)   (Kingma et al. 2021, "Variational diffusion models", app. I.1)

    Args:
        batch_size: B.
        num_timesteps: T.
        rng: source of u.

    Returns:
        int64 (B,) in [0, T).

    >>> stratified_timesteps(4, 1000, torch.Generator().manual_seed(0)).sort().values.diff()
    tensor([250, 250, 250])
    """
    u = torch.rand((), generator=rng, dtype=torch.float64)
    positions = (u + torch.arange(batch_size, dtype=torch.float64) / batch_size) % 1
    return (positions * num_timesteps).long().clamp_max(num_timesteps - 1)


def generator(seed: int, index: int, stream: int) -> torch.Generator:
    """A CPU generator of its own for each (seed, index, stream).

    Args:
        seed: of the run.
        index: number of the step or epoch.
        stream: 0 or 1, for different draws of one step.
    """
    return torch.Generator().manual_seed(derive(seed * 2 + stream, index))
