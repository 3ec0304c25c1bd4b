"""PAR: progressively aligned reconstruction (docs/method.md, "PAR").

Calibration starts from what the full-precision sampler visits, but at inference the quantized model meets what its own
sampler visits, and the two drift apart along a trajectory. So all units are reconstructed again, in rounds 1 .. M, on
trajectories that the quantized sampler draws from the same noise (TCAQ-DM, Huang et al., AAAI 2025, arXiv:2412.16700).
"Progressively": round m replaces a share rho_m of the trajectories, 0 = rho_0 < ... <= rho_M.

The decisions are here: how large the share is, which trajectories are replaced, what a round is judged by, and whether
it is kept. `calibration/rounds.py` carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tcaq_lightning.config import Config, PARConfig
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.runtime.seeds import derive


def quantized_share(config: PARConfig, round_index: int) -> float:
    """rho_m = rho_M m / M, the share of a round's trajectories that the quantized sampler draws.

    Args:
        config: `par` of the run.
        round_index: m, 0 .. M.

    >>> [quantized_share(PARConfig(rounds=4, final_share=1.0), m) for m in range(5)]
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return config.final_share * round_index / config.rounds


@dataclass(frozen=True)
class Draw:
    """Which calibration trajectories a later round learns from.

    Attributes:
        share: rho_m.
        seed: what the draw came from.
        replaced: (round(rho_m n),) numbers of those that the quantized sampler draws anew, from the same noise.
        unchanged: numbers of the others of the n, which stay as the full-precision sampler drew them.
    """

    share: float
    seed: int
    replaced: Tensor
    unchanged: Tensor


def draw(config: Config, round_index: int) -> Draw:
    """Draw a round's trajectories: a function of the run's seed and the round alone.

    Args:
        config: of the run.
        round_index: m, 1 .. M.
    """
    share = quantized_share(config.par, round_index)
    seed = derive(config.seed, round_index)
    order = torch.randperm(config.calibration.num_trajectories, generator=torch.Generator().manual_seed(seed))
    learned = order[: config.learned_trajectories(round_index)]
    replaced, unchanged = learned.tensor_split([round(share * len(learned))])
    return Draw(share, seed, replaced, unchanged)


def aligned_samples(
    drawn: Draw,
    full_precision: Trajectories,
    redrawn: Trajectories | None,
    held_out: Trajectories,
    held_out_quantized: Trajectories,
) -> Trajectories:
    """The trajectories of a round, those that it learns from first, then those that it is judged by.

    Args:
        drawn: what `draw` chose.
        full_precision: calibration trajectories of the full-precision sampler.
        redrawn: those numbered `drawn.replaced` by the quantized sampler as it now is; None if there are none.
        held_out: N trajectories of the full-precision sampler that units are judged by.
        held_out_quantized: N trajectories of the quantized sampler from the same noise; a share rho_m of them is taken.
    """
    judged = mixed(held_out, held_out_quantized, drawn.share, drawn.seed)
    learned = [] if redrawn is None else [redrawn]
    return Trajectories.join([*learned, full_precision.select(drawn.unchanged), judged])


def mixed(full_precision: Trajectories, quantized: Trajectories, share: float, seed: int) -> Trajectories:
    """Replace a share of the trajectories by the quantized sampler's from the same noise.

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
    return Trajectories(
        torch.where(_like(replaced, quantized.inputs[0]), quantized.inputs, full_precision.inputs),
        full_precision.timesteps,
        torch.where(_like(replaced, quantized.finals), quantized.finals, full_precision.finals),
        full_precision.conditioning,
        full_precision.halves,
    )


def _like(chosen: Tensor, samples: Tensor) -> Tensor:
    """(N,) as (N, 1, ..., 1) beside samples (N, ...)."""
    return chosen.view(-1, *[1] * (samples.ndim - 1))


def mismatch(quantized: Trajectories, full_precision: Trajectories) -> Tensor:
    """Relative distance of the two samplers' x_t by sampler step, over all trajectories: what a round is judged by.

    ||x_t^q - x_t^fp||^2 / ||x_t^fp||^2   (docs/method.md, "PAR")

    Args:
        quantized: N trajectories of the quantized sampler.
        full_precision: N trajectories of the full-precision sampler, same noises.

    Returns:
        (S / halves,) float64: with guidance both rows of a sample have one x_t.
    """
    met, expected = (x.inputs[:: x.halves] for x in (quantized, full_precision))
    difference = (met - expected).flatten(1).double()
    return difference.square().sum(1) / expected.flatten(1).double().square().sum(1)


def helped(mean_mismatch: float, best: float) -> bool:
    """Whether a round's result is kept: the mean mismatch on held-out noise has to fall, else the round is undone.

    Args:
        mean_mismatch: mean of `mismatch` after the round.
        best: the least one after the rounds before.

    >>> helped(0.1, best=0.2), helped(0.2, best=0.2)
    (True, False)
    """
    return mean_mismatch < best
