"""Uniform affine quantization with learnable steps.

q = clip(round(x / s) + z, 0, 2^b - 1),  x^ = s (q - z)   (Jacob et al. 2018, eq. 1; METHOD section 1)

Everything here works on `low = -z` and `high = 2^b - 1 - z`, the range of q - z, so that symmetric weights and
affine activations are one case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

HALF = 0.5001
"""Of a step: what is rounded moves by no more than a half, and by what float32 loses of codes up to 255."""


BLOCK = 1 << 17
"""Values that a CPU thread works on at once: what is between two operations on them then stays in its cache."""


def _blocks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching blocks of rows of operands that broadcast to `x`; on a CPU small ones, elsewhere all rows at once."""
    size = BLOCK * torch.get_num_threads()
    whole = x.device.type != "cpu" or x.ndim < 2 or x.numel() < 2 * size
    if whole or others[0].shape[:1] != x.shape[:1]:  # the first one's gradient is summed block by block
        yield (x, *others)
        return
    rows = max(1, size * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        yield (x[part], *(o[part] if o.ndim == x.ndim and o.shape[0] == x.shape[0] else o for o in others))


def _quantized(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """step * clip(round(x / step), low, high); `clamp` with tensor bounds is far slower on a CPU."""
    if torch.compiler.is_compiling():  # it knows no `out`
        return torch.minimum(torch.maximum((x / step).round(), low), high) * step
    quantized = torch.empty_like(x, dtype=torch.promote_types(x.dtype, step.dtype))
    for values, s, bottom, top, result in _blocks(x, step, low, high, quantized):
        torch.div(values, s, out=result).round_()
        torch.maximum(result, bottom, out=result)
        torch.minimum(result, top, out=result).mul_(s)
    return quantized


class _FakeQuantize(torch.autograd.Function):
    """Round and clip with a straight-through gradient to `x` and an LSQ gradient to `step` (Esser et al. 2020).

    Written with float operations, in place where they can be, because on a CPU torch's native learnable kernel is
    scalar, about ten times slower than these, and arithmetic that mixes float and boolean tensors is slower still.
    The gradient is computed from the result, which the operation that reads it keeps for its own gradient anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
        quantized = _quantized(x, step, low, high)
        ctx.save_for_backward(x, step, quantized)
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, step, quantized = ctx.saved_tensors
        learned = ctx.needs_input_grad[1]
        if torch.compiler.is_compiling():
            grad_x = torch.where((quantized - x).abs() <= step * HALF, grads[0], 0.0)
            slope = quantized * grads[0] - grad_x * x
            return grad_x, slope.sum_to_size(step.shape) / step if learned else None, None, None
        grad_x, grad_step = torch.empty_like(quantized), torch.empty_like(step)  # autograd narrows the former
        for values, s, result, grad, to_x, to_step in _blocks(x, step, quantized, grads[0], grad_x, grad_step):
            work = torch.sub(result, values).abs_().le_(s * HALF)  # 1 where nothing was clipped, else 0
            torch.mul(work, grad, out=to_x)
            if learned:  # sum of g (q - x / s) inside, g q outside
                torch.mul(result, grad, out=work).addcmul_(to_x, values, value=-1)
                to_step.copy_(work.sum_to_size(s.shape)).div_(s)
        return grad_x if ctx.needs_input_grad[0] else None, grad_step if learned else None, None, None


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
