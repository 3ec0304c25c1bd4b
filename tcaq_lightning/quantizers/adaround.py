"""Learned rounding, AdaRound (Nagel et al. 2020, "Up or Down?", section 3)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tcaq_lightning.runtime.kernels import Kernel

GAMMA = -0.1
ZETA = 1.1
"""Ends of the stretched sigmoid, as published: with them h reaches 0 and 1 at finite V."""


@torch.no_grad()
def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)   (Nagel et al. 2020, eq. 23).

    Without a gradient: `soft_round` and `adaround_regularizer` have theirs in closed form, from the sigmoid alone.

    >>> rectified_sigmoid(torch.tensor([-5.0, 0.0, 5.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return torch.sigmoid(v).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def initial_logits(fraction: Tensor) -> Tensor:
    """V with h(V) = `fraction`, so that soft rounding starts at the full-precision weight.

    Args:
        fraction: w/s - floor(w/s), in [0, 1).

    >>> rectified_sigmoid(initial_logits(torch.tensor([0.0, 0.25, 0.75])))
    tensor([0.0000, 0.2500, 0.7500])
    """
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


_aten: Any = torch.ops.aten


def _through_sigmoid(grad_h: Tensor, sigmoid: Tensor) -> Tensor:
    """dL/dh to dL/dV but for the factor zeta - gamma: s (1 - s) where h is not clipped, else 0, in two passes."""
    low, high = -GAMMA / (ZETA - GAMMA), (1 - GAMMA) / (ZETA - GAMMA)
    grad: Tensor = _aten.sigmoid_backward(_aten.hardtanh_backward(grad_h, sigmoid, low, high), sigmoid)
    return grad


@partial(Kernel, like=[0, 0])
def _rounded(v: Tensor, base: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(v)
    return (sigmoid * (ZETA - GAMMA)).add_(GAMMA).clamp_(0, 1).add_(base).mul_(unit), sigmoid


@partial(Kernel, like=[0])
def _logit_gradient(grad: Tensor, sigmoid: Tensor, unit: Tensor) -> Tensor:
    return _through_sigmoid(grad * (unit * (ZETA - GAMMA)), sigmoid)


@partial(Kernel, like=[0, 3])
def _gradients(grad: Tensor, sigmoid: Tensor, rounded: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the logits and of the unit."""
    grad_v = _through_sigmoid(grad * (unit * (ZETA - GAMMA)), sigmoid)
    return grad_v, (grad * rounded).sum_to_size(unit.shape) / unit


class _SoftRound(torch.autograd.Function):
    """(base + h(V)) unit, in closed form: a chain of autograd's own operations would pass over V twice as often."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, base: Tensor, unit: Tensor) -> Tensor:
        rounded: Tensor
        rounded, sigmoid = _rounded(v, base, unit)
        ctx.save_for_backward(sigmoid, unit, rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        sigmoid, unit, rounded = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            return _logit_gradient(grads[0], sigmoid, unit), None, None
        grad_v, grad_unit = _gradients(grads[0], sigmoid, rounded, unit)
        return grad_v, None, grad_unit


def soft_round(v: Tensor, base: Tensor, unit: Tensor) -> Tensor:
    """A weight with soft rounding, (base + h(V)) unit   (Nagel et al. 2020, eq. 22).

    Args:
        v: rounding logits.
        base: codes rounded down, of v's shape; no gradient.
        unit: what a code is worth, not 0, broadcastable to v.

    >>> soft_round(torch.tensor([-9.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 1.0]), torch.tensor(0.5))
    tensor([0.5000, 0.7500, 1.0000])
    """
    rounded: Tensor = _SoftRound.apply(v, base, unit)  # type: ignore[no-untyped-call]
    return rounded


@Kernel
def _regularized(grad: Tensor, v: Tensor, beta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(v)
    distance = (sigmoid * (2 * (ZETA - GAMMA))).add_(2 * GAMMA - 1).clamp_(-1, 1)  # 2h - 1
    power = distance.abs().log_().mul_(beta - 1).exp_()  # |2h - 1|^(beta - 1); `pow` takes twice as long on a CPU
    power.copysign_(distance)
    penalty = v.numel() - (power * distance).sum()
    return penalty, torch.addcmul(grad, _through_sigmoid(power, sigmoid), weight * beta * (-2 * (ZETA - GAMMA)))


@torch.no_grad()
def adaround_regularizer(v: Tensor, grad: Tensor, beta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Push every rounding variable to 0 or 1.

    f_reg(V) = sum(1 - |2 h(V) - 1|^beta)   (Nagel et al. 2020, eq. 24)

    The regulariser is added to the loss, so that its gradient, in closed form and with most of the work in common, is
    added to the loss' own: autograd would pass over V five times more.

    Args:
        v: rounding logits, any shape.
        grad: gradient of the loss without the regulariser, of v's shape.
        beta: scalar, annealing exponent above 1; 20 is almost flat, 2 is sharp.
        weight: scalar, lambda, by which the loss weighs the regulariser.

    Returns:
        f_reg(V), a scalar in number of undecided weights, and the gradient with the regulariser.

    >>> adaround_regularizer(torch.tensor([-9.0, 0.0]), torch.tensor([1.0, 2.0]), torch.tensor(2.0), torch.tensor(1.0))
    (tensor(1.), tensor([1., 2.]))
    """
    penalty, total = _regularized(grad.flatten(), v.flatten(), beta, weight)
    return penalty, total.view(v.shape)


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
