"""Uniform affine quantization with learnable steps.

q = clip(round(x / s) + z, 0, 2^b - 1),  x^ = s (q - z)   (Jacob et al. 2018, eq. 1; METHOD section 1)

Everything here works on `low = -z` and `high = 2^b - 1 - z`, the range of q - z, so that symmetric weights and
affine activations are one case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALF = 0.5001
"""Of a step: what is rounded moves by no more than a half, and by what float32 loses of codes up to 255."""


def _codes(scaled: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """round(scaled) within [low, high], in place; `clamp` with tensor bounds is far slower on a CPU."""
    if torch.compiler.is_compiling():  # it knows no `out`
        return torch.minimum(torch.maximum(scaled.round(), low), high)
    codes = torch.maximum(scaled.round_(), low, out=scaled)
    return torch.minimum(codes, high, out=codes)


class _FakeQuantize(torch.autograd.Function):
    """Round and clip with a straight-through gradient to `x` and an LSQ gradient to `step` (Esser et al. 2020).

    Written with float operations, in place where they can be, because on a CPU torch's native learnable kernel is
    scalar, about ten times slower than these, and arithmetic that mixes float and boolean tensors is slower still.
    The gradient is computed from the result, which the operation that reads it keeps for its own gradient anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
        quantized = _codes(x / step, low, high).mul_(step)
        ctx.save_for_backward(x, step, quantized)
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, step, quantized = ctx.saved_tensors
        inside = torch.sub(quantized, x).abs_().le_(step * HALF)  # 1 where nothing was clipped, else 0
        grad_step = None
        if ctx.needs_input_grad[1]:  # (q - x / s) inside, q outside
            slope = torch.addcmul(quantized, x, inside, value=-1)
            grad_step = slope.mul_(grad).sum_to_size(step.shape) / step
        return inside.mul_(grad) if ctx.needs_input_grad[0] else None, grad_step, None, None


def keeping_type(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module.to` does to a tensor, but for a change of its type: narrower ones cannot hold grids and scales."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype is tensor.dtype else tensor.to(result.device)

    return moved


def fake_quantize(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Quantize and dequantize: step * clip(round(x / step), low, high), ties to even.

    Args:
        x: any shape.
        step: positive, broadcastable to `x`. Receives the LSQ gradient sum(g (q - x/s)) inside the range and
            sum(g q) outside it.
        low: smallest code minus zero point, integer-valued, broadcastable to `x`.
        high: largest code minus zero point, likewise.

    Returns:
        Tensor of `x`'s shape.

    >>> x = torch.tensor([-0.3, 0.24, 0.26, 9.0])
    >>> fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), torch.tensor(15.0))
    tensor([-0.0000, 0.0000, 0.5000, 7.5000])
    """
    quantized: Tensor = _FakeQuantize.apply(x, step, low, high)  # type: ignore[no-untyped-call]
    return quantized


def affine_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero point that cover [low, high] and represent 0 exactly.

    Args:
        low: smallest value to cover; raised to 0 from above. Any shape.
        high: largest value to cover, same shape.
        bits: code width b.

    Returns:
        (delta, zero_point), same shape; zero_point is integer-valued in [0, 2^b - 1]. A range that is a single point
        gets delta 1.

    >>> affine_range(torch.tensor(-1.0), torch.tensor(2.0), bits=2)
    (tensor(1.), tensor(1.))
    """
    levels = 2**bits - 1
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    width = high - low
    delta = torch.where(width > 0, width / levels, torch.ones_like(width))
    delta = delta.clamp(min=torch.finfo(delta.dtype).tiny * 1e6)
    return delta, torch.round(-low / delta).clamp(0, levels)
