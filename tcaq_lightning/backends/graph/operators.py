"""QuantizeLinear and DequantizeLinear as operations that are traced, and the constants that they share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.quantizers.activation import along


class _Quantize(torch.autograd.Function):
    """QuantizeLinear: clip(round(x / scale) + zero_point) to the zero point's integer type, ties to even."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:  # noqa: ARG004
        limits = torch.iinfo(zero_point.dtype)
        codes = torch.round(x / scale) + zero_point.float()
        return codes.clamp(limits.min, limits.max).to(zero_point.dtype)

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero_point: Any) -> Any:
        return g.op("QuantizeLinear", x, scale, zero_point)


class _Dequantize(torch.autograd.Function):
    """DequantizeLinear: (codes - zero_point) scale, both scalar or along an axis."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:  # noqa: ARG004
        if scale.ndim:
            scale, zero_point = (along(values, codes.ndim, axis) for values in (scale, zero_point))
        return (codes.float() - zero_point.float()) * scale

    @staticmethod
    def symbolic(g: Any, codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        return g.op("DequantizeLinear", codes, scale, zero_point, axis_i=axis)


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 1) -> Tensor:
    """DequantizeLinear: (codes - zero_point) scale.

    Args:
        codes: integers of any shape.
        scale: a scalar, or a vector along `axis`.
        zero_point: of the scale's shape and the codes' type.
        axis: axis of the codes that vectors lie along.
    """
    values: Tensor = _Dequantize.apply(codes, scale, zero_point, axis)  # type: ignore[no-untyped-call]
    return values


def coded(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """QuantizeLinear to the zero point's type, and DequantizeLinear, with scalars.

    Args:
        x: any shape.
        scale: a scalar.
        zero_point: a scalar of the codes' type.
    """
    codes = _Quantize.apply(x, scale, zero_point)  # type: ignore[no-untyped-call]
    return dequantized(codes, scale, zero_point)


class Constants(nn.Module):
    """Scalar scales and zero points of the graph, each once."""

    def scalar(self, value: float, dtype: torch.dtype) -> Tensor:
        """A 0-d tensor of the graph."""
        name = f"{str(dtype).removeprefix('torch.')}_{len(self._buffers)}"
        for known in self._buffers.values():
            if known is not None and known.dtype is dtype and known.item() == torch.tensor(value, dtype=dtype).item():
                return known
        self.register_buffer(name, torch.tensor(value, dtype=dtype))
        return getattr(self, name)  # type: ignore[no-any-return]
