"""Uniform affine quantization with learnable steps.

q = clip(round(x / s) + z, 0, 2^b - 1),  x^ = s (q - z)   (Jacob et al. 2018, eq. 1; docs/method.md, "Quantizers")

Everything here works on `low = -z` and `high = 2^b - 1 - z`, the range of q - z, so that symmetric weights and
affine activations are one case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tcaq_lightning.runtime.kernels import LARGE, Kernel
from tcaq_lightning.runtime.precision import autocast_type

HALF = 0.5001
"""Of a step: what is rounded moves by no more than a half, and by what float32 loses of codes up to 255."""


def _blocks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching blocks of rows of operands that broadcast to `x`; on a CPU small ones, elsewhere all rows at once."""
    size = LARGE * torch.get_num_threads()
    whole = x.device.type != "cpu" or x.ndim < 2 or x.numel() < 2 * size
    if whole or others[0].shape[:1] != x.shape[:1]:  # the first one's gradient is summed block by block
        yield (x, *others)
        return
    rows = max(1, size * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        yield (x[part], *(o[part] if o.ndim == x.ndim and o.shape[0] == x.shape[0] else o for o in others))


def _quantize(x: Tensor, step: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """step * clip(round(x / step), low, high), computed in the wider of both types and given in `dtype`."""
    return (torch.minimum(torch.maximum((x / step).round(), low), high) * step).to(dtype)


def _quantize_by_hand(x: Tensor, step: Tensor, low: Tensor, high: Tensor, _dtype: torch.dtype) -> Tensor:
    """In the wider type, for the gradient's sake; `clamp` with tensor bounds is far slower on a CPU."""
    quantized = torch.empty_like(x, dtype=torch.promote_types(x.dtype, step.dtype))
    for values, s, bottom, top, result in _blocks(x, step, low, high, quantized):
        torch.div(values, s, out=result).round_()
        torch.maximum(result, bottom, out=result)
        torch.minimum(result, top, out=result).mul_(s)
    return quantized


def _gradients(
    grad: Tensor, x: Tensor, _quantized: Tensor, step: Tensor, low: Tensor, high: Tensor, learned: bool
) -> tuple[Tensor, Tensor | None]:
    """Straight-through gradient to x, and, if it is learned, LSQ gradient to the step.

    Args:
        grad: gradient to the result.
        x: input, of the same shape.
        step: step, a scalar or broadcastable to x.
        low: lower end of the grid's range.
        high: upper end of the grid's range.
        learned: whether the step is learned.
    """
    scaled = x / step  # to compute it again takes less than to read the result
    codes = scaled.round()
    clipped = torch.minimum(torch.maximum(codes, low), high)
    within = codes == clipped
    grad_x = torch.where(within, grad, 0.0)
    if not learned:
        return grad_x, None
    return grad_x, (torch.where(within, clipped - scaled, clipped) * grad).sum_to_size(step.shape)


def _gradients_by_hand(
    grad: Tensor, x: Tensor, quantized: Tensor, step: Tensor, _low: Tensor, _high: Tensor, learned: bool
) -> tuple[Tensor, Tensor | None]:
    """From the result, in place where it can be: arithmetic that mixes float and boolean tensors is slow on a CPU."""
    grad_x, grad_step = torch.empty_like(quantized), torch.empty_like(step)  # autograd narrows the former
    for values, s, result, upstream, to_x, to_step in _blocks(x, step, quantized, grad, grad_x, grad_step):
        work = torch.sub(result, values).abs_().le_(s * HALF)  # 1 where nothing was clipped, else 0
        torch.mul(work, upstream, out=to_x)
        if learned:  # sum of g (q - x / s) inside, g q outside
            torch.mul(result, upstream, out=work).addcmul_(to_x, values, value=-1)
            to_step.copy_(work.sum_to_size(s.shape)).div_(s)
    return grad_x, grad_step if learned else None


_quantize_kernel = Kernel(_quantize, _quantize_by_hand, like=[0])
_gradients_kernel = Kernel(_gradients, _gradients_by_hand, like=[1, 3])


class _FakeQuantize(torch.autograd.Function):
    """Round and clip with a straight-through gradient to `x` and an LSQ gradient to `step` (Esser et al. 2020).

    On a CPU torch's native learnable kernel is scalar, about ten times slower than this.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
        quantized: Tensor = _quantize_kernel(x, step, low, high, dtype)
        ctx.save_for_backward(x, quantized, step, low, high)
        return quantized.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, *others = ctx.saved_tensors
        grad = grads[0].contiguous() if x.is_contiguous() else grads[0]  # operands of one layout: one sweep over memory
        grad_x, grad_step = _gradients_kernel(grad, x, *others, ctx.needs_input_grad[1])
        return grad_x if ctx.needs_input_grad[0] else None, grad_step, None, None, None


def keeping_type(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module.to` does to a tensor, but for a change of its type: narrower ones cannot hold grids and scales."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype is tensor.dtype else tensor.to(result.device)

    return moved


def fake_quantize(x: Tensor, step: Tensor, low: Tensor, high: Tensor, narrow: bool = False) -> Tensor:
    """Quantize and dequantize: step * clip(round(x / step), low, high), ties to even.

    Args:
        x: any shape, that of the result.
        step: positive, broadcastable to `x`. Receives the LSQ gradient sum(g (q - x/s)) inside the range and
            sum(g q) outside it.
        low: smallest code minus zero point, integer-valued, broadcastable to `x`.
        high: largest code minus zero point, likewise.
        narrow: for a product to read: within autocast the result has the type that the product would give it.

    Returns:
        Tensor of `x`'s shape.

    >>> x = torch.tensor([-0.3, 0.24, 0.26, 9.0])
    >>> fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), torch.tensor(15.0))
    tensor([-0.0000, 0.0000, 0.5000, 7.5000])
    """
    dtype = (autocast_type(x) if narrow else None) or torch.promote_types(x.dtype, step.dtype)
    quantized: Tensor = _FakeQuantize.apply(x, step, low, high, dtype)  # type: ignore[no-untyped-call]
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
