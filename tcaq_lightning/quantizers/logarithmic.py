"""Logarithmic quantizers for post-softmax values in [0, 1].

q = clip(round(-log2(x / delta) / tau), 0, 2^b - 1),  x^ = delta 2^(-tau q),  and the last code means 0.

tau = 1 is log2 (FQ-ViT, Lin et al. 2022), tau = 1/2 is log-sqrt2 (RepQ-ViT, Li et al. 2023), tau = k / 37 with a
searched integer k is AdaLog (Wu et al. 2024): one signature for the whole family.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tcaq_lightning.runtime.kernels import Kernel

ADALOG_RESOLUTION = 37
"""Denominator of AdaLog's exponents (Wu et al. 2024, eq. 9)."""

ADALOG_TAUS = tuple(k / ADALOG_RESOLUTION for k in range(9, 2 * ADALOG_RESOLUTION, 4))
"""Exponents that the AdaLog search tries, from about log-sqrt(sqrt2) to about log4."""


def log_codes(x: Tensor, delta: Tensor, tau: Tensor, bits: int) -> Tensor:
    """Integer codes of `x`, as floats in 0 .. 2^b - 1.

    Args:
        x: non-negative values, any shape.
        delta: value of code 0, positive, broadcastable to `x`.
        tau: exponent between neighbouring codes, positive, broadcastable to `x`.
        bits: code width b.

    >>> log_codes(torch.tensor([1.0, 0.3, 0.25, 0.0]), torch.tensor(1.0), torch.tensor(1.0), bits=2)
    tensor([0., 2., 2., 3.])
    """
    codes: Tensor = torch.round(torch.log2(x / delta).div_(tau).neg_()).clamp_(0, 2**bits - 1)
    return codes


def log_values(codes: Tensor, delta: Tensor, tau: Tensor, bits: int) -> Tensor:
    """Values of integer codes; the last code is 0.

    Args:
        codes: integer codes, float-valued.
        delta: value of code 0, broadcastable to the codes.
        tau: exponent of a step, broadcastable to the codes.
        bits: code width.

    >>> log_values(torch.arange(4.0), torch.tensor(1.0), torch.tensor(1.0), bits=2)
    tensor([1.0000, 0.5000, 0.2500, 0.0000])
    """
    present = (2**bits - 1 - codes).clamp_(max=1)  # 0 for the last code; float, since boolean factors are slow on a CPU
    return torch.exp2(-tau * codes).mul_(delta).mul_(present)


@partial(Kernel, like=[0, 0])
def _quantize(x: Tensor, delta: Tensor, tau: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Values, and 1 where the gradient passes, else 0."""
    codes = log_codes(x, delta, tau, bits)
    inside = (2**bits - 1 - codes).clamp_(max=1)
    inside.mul_((x <= delta * torch.exp2(0.5 * tau)).to(x.dtype))
    return log_values(codes, delta, tau, bits), inside


class _LogFakeQuantize(torch.autograd.Function):
    """Straight-through where a value is neither clipped above nor sent to 0.

    `delta` gets no gradient: in the open range the straight-through gradient of delta 2^(-tau q(x/delta)) with
    respect to delta is exactly 0, so it is searched and not learned.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, tau: Tensor, bits: int) -> Tensor:
        values: Tensor
        values, inside = _quantize(x, delta, tau, bits)
        ctx.save_for_backward(inside)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


def log_fake_quantize(x: Tensor, delta: Tensor, tau: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize `x` in the log domain, differentiable in `x`; arguments as in `log_codes`."""
    quantized: Tensor = _LogFakeQuantize.apply(x, delta, tau, bits)  # type: ignore[no-untyped-call]
    return quantized
