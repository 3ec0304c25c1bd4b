"""Learned rounding, AdaRound (Nagel et al. 2020, "Up or Down?", section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAMMA = -0.1
ZETA = 1.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)   (Nagel et al. 2020, eq. 23).

    >>> rectified_sigmoid(torch.tensor([-5.0, 0.0, 5.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return torch.clamp(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)


def initial_logits(fraction: Tensor) -> Tensor:
    """V with h(V) = `fraction`, so that soft rounding starts at the full-precision weight.

    Args:
        fraction: w/s - floor(w/s), in [0, 1).

    >>> rectified_sigmoid(initial_logits(torch.tensor([0.0, 0.25, 0.75])))
    tensor([0.0000, 0.2500, 0.7500])
    """
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def adaround_regularizer(v: Tensor, beta: float) -> Tensor:
    """Push every rounding variable to 0 or 1.

    f_reg(V) = sum(1 - |2 h(V) - 1|^beta)   (Nagel et al. 2020, eq. 24)

    Args:
        v: rounding logits, any shape.
        beta: annealing exponent; 20 is almost flat, 2 is sharp.

    Returns:
        Scalar, in number of undecided weights.

    >>> adaround_regularizer(torch.tensor([-10.0, 10.0]), beta=2.0)
    tensor(0.)
    """
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def annealed_beta(progress: float, start: float = 20.0, end: float = 2.0, warmup: float = 0.2) -> float:
    """Exponent of the regulariser, falling linearly from `start` to `end` after the warm-up.

    Args:
        progress: share of the V phase done, in [0, 1].
        start: exponent at the end of the warm-up.
        end: exponent at the end of the phase.
        warmup: share of the phase without regulariser.

    Returns:
        beta, or infinity within the warm-up (the regulariser is then not used).

    >>> annealed_beta(0.1), annealed_beta(0.6), annealed_beta(1.0)
    (inf, 11.0, 2.0)
    """
    if progress < warmup:
        return math.inf
    return start + (end - start) * (progress - warmup) / (1 - warmup)


def undecided_share(v: Tensor, margin: float = 0.05) -> float:
    """Share of weights whose soft rounding is farther than `margin` from both 0 and 1.

    >>> undecided_share(torch.tensor([-9.0, 0.0, 9.0, 9.0]))
    0.25
    """
    h = rectified_sigmoid(v)
    return ((h > margin) & (h < 1 - margin)).float().mean().item()
