"""The error of a unit's outputs that calibration lowers, with its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tcaq_lightning.models.unit_outputs import (
    Outputs,
    beside_channels,
    channel_count,
    channel_means,
    mean_squares,
    output_tensors,
)
from tcaq_lightning.runtime.kernels import Kernel


def block_error(output: Outputs, target: Outputs, weights: Tensor | None = None) -> Tensor:
    """Squared difference summed over channels, averaged over the rest (docs/method.md, "Learned rounding").

    Args:
        output: (B, C, H, W), (B, T, C) or (B, C); the errors of several outputs are added.
        target: of the same shapes.
        weights: (B, C) weights of the squares, the channels of several outputs in sequence; None: all are 1.

    Returns:
        Scalar.

    >>> block_error(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    tensor(3.)
    """
    return weighted_error(channel_errors(output, target)[0], weights)


def weighted_error(squares: Tensor, weights: Tensor | None = None) -> Tensor:
    """The block error of (B, C) mean squares of each sample's channels; weights as in `block_error`.

    Args:
        squares: (B, C) mean squares of each sample's channels.
        weights: (B, C); None: all are 1.
    """
    return (squares if weights is None else squares * weights).sum(1).mean()


@Kernel
def _errors(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """output - target, and the means of its squares and of itself by sample and channel."""
    difference = output - target
    return difference, mean_squares(difference), channel_means(difference)


@Kernel
def _scale_by_channel(difference: Tensor, factor: Tensor) -> Tensor:
    return difference * beside_channels(factor, difference.ndim)


class _ChannelErrors(torch.autograd.Function):
    """Means of (output - target)^2, with their gradient, and of output - target, by sample and channel.

    Each pass over an output counts beside small units: autograd's own chain takes three times as many.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        difference, squares, means = _errors(output, target)
        ctx.save_for_backward(difference)
        ctx.mark_non_differentiable(means)
        return squares, means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        factor = grads[0] * (2 * grads[0].numel() / difference.numel())
        grad: Tensor = _scale_by_channel(difference, factor)
        return grad, None


def channel_errors(output: Outputs, target: Outputs) -> tuple[Tensor, Tensor]:
    """(B, C) means of squared errors and of errors, output - target, those of several outputs in sequence.

    Only the squares have a gradient.

    Args:
        output: as in `block_error`.
        target: as in `block_error`.
    """
    pairs = zip(output_tensors(output), output_tensors(target), strict=True)
    found = [_ChannelErrors.apply(x, y) for x, y in pairs]  # type: ignore[no-untyped-call]
    squares, errors = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return squares, errors


@torch.no_grad()
def gradient_scale(output: Outputs, error: Tensor, weights: Tensor | None = None) -> Tensor | None:
    """Factor on a loss with which float16 can hold its gradients; None for other types.

    The block error is a mean over a batch's pixels or tokens, so the gradient of each one may be too small for
    float16. The factor, a power of 2, brings the root mean square of the output's gradient to about 1.

    Args:
        output: the unit's output.
        error: its block error.
        weights: (B, C) as in `block_error`.

    >>> gradient_scale(torch.zeros(2, 4, 8, 4, dtype=torch.float16), torch.tensor(1.0))
    tensor(64.)
    """
    narrow = [x for x in output_tensors(output) if x.dtype is torch.float16]
    if not narrow:
        return None
    channels = sum(channel_count(tuple(x.shape[1:])) for x in narrow)
    places = sum(x.numel() for x in narrow) / channels
    square = 4 * error * (1.0 if weights is None else weights.mean()) / channels  # of 2 w (y - t), averaged
    exponent = (math.log2(places) - square.clamp(min=1e-30).log2() / 2).round()
    return torch.exp2(exponent.clamp(0, 40))
