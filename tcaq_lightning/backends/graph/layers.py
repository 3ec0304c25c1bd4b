"""Quantized layers of the exported graph: products of integers as they are stored.

Every product of a quantized layer is taken of codes that an integer kernel can hold, with constant scales and zero
points; what depends on the timestep stands around it as cheap operations on floats:

    x^ = r s_g (u - z_g),  u = clip(round(x / (r s_g)) + z_g, 0, 2^b - 1)   (docs/method.md, "Quantizers")
    W x^ + b = s_g (W' u) + (b - s_g z_g W' 1)                              W' = scale (q - z) (docs/method.md, "TCR")

W' u runs on uint8 x int8. W' 1 is a constant of each output channel, for a padded convolution of each pixel too: what
is padded is u = 0 and not z_g, so the border sees less of it. Where all groups have one zero point it is the
quantizer's own, and where they have one step too, step and zero point are constants of the graph.

Where the output is quantized too (`OutputQuantizer`), the codes of the input lie around one zero point Z for all
groups, u - z_g + Z, which is also what is padded, and

    e = clip(round(W'' (u - z_g) + n scale / delta) + 128, 0, 255),  W'' = scale / delta (q - z)
    W x^ + b = s_g delta (e - 128) + (b - s_g scale n)

so that e is made of constants alone: an integer bias n, a scale for each channel, a step of 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcaq_lightning.backends.graph.operators import Constants, coded, dequantized
from tcaq_lightning.backends.graph.quantizers import GraphQuantizer
from tcaq_lightning.backends.graph.tables import Timesteps
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.layers import QuantConv2d, QuantLayer, QuantLinear
from tcaq_lightning.quantizers import OutputQuantizer
from tcaq_lightning.quantizers.output import LOWEST
from tcaq_lightning.quantizers.weight import column


class GraphLayer(nn.Module):
    """A `QuantLayer` on integer codes; subclasses say how they are multiplied.

    Attributes:
        codes: int8 q - z beside a `zero_point` of 0; uint8 q beside z where a code does not fit (8 bits, asymmetric).
        scale: (O,) of the codes; where the output is quantized, in steps of its.
        offset: (O,) integer bias n of a quantized output, or None.
        output_step: (O,) delta of a quantized output.
        output_shift: (O,) scale n of a quantized output.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    offset: Tensor | None
    output_step: Tensor
    output_shift: Tensor
    code_scale: Tensor
    output_zero: Tensor
    offset_zero_point: Tensor

    axis: int  # of the output channels within the stored codes

    def __init__(self, source: QuantLayer, inputs: GraphQuantizer, times: Timesteps, constants: Constants) -> None:
        super().__init__()
        weight = source.weight_quantizer
        if weight.learns:
            raise ValueError(f"{source.name} still learns its rounding; call freeze(denoiser) before")
        zero_point = weight.zero_point
        if not weight.number_format.integers or zero_point is None:
            raise UserError(
                f"unsupported layer {source.name}: its weight has the number format {weight.number_format.name}, "
                f"which is not one of integers; expected int, or a rule that keeps the layer in full precision: "
                f"quantization.rules: [{{pattern: {source.name}, keep: true}}]"
            )
        held: Any = weight
        self.name, self.bits, self.inputs, self.times = source.name, weight.bits, inputs, times
        self.out_channels = source.out_channels
        codes = held.codes.int() - column(zero_point, held.codes).int()
        fits = int(codes.min()) >= -128 and int(codes.max()) <= 127
        self.register_buffer("codes", self.stored(codes.to(torch.int8) if fits else held.codes))
        zero_point = zero_point.to(torch.uint8)
        self.register_buffer("zero_point", torch.zeros_like(zero_point, dtype=torch.int8) if fits else zero_point)
        self.register_buffer("scale", weight.scale.clone())
        self.register_buffer("offset", None)
        if source.output_quantizer is not None:
            self._quantize_output(source.output_quantizer, constants)
        self.code_sums = self.summed(codes.long()).numpy()
        self.register_buffer("bias", _whole_bias(source))
        self.correction = None if source.bias_shift is None else times.correction(source.bias_shift)

    def _quantize_output(self, outputs: OutputQuantizer, constants: Constants) -> None:
        assert self.inputs.centre is not None
        step = outputs.steps().detach()
        self.register_buffer("output_step", step)
        self.register_buffer("output_shift", self.scale * outputs.offset)
        self.register_buffer("scale", self.scale / step)
        self.register_buffer("offset", outputs.offset.to(torch.int32))
        self.register_buffer("offset_zero_point", torch.zeros_like(outputs.offset, dtype=torch.int32))
        self.code_scale = constants.scalar(1.0, torch.float32)
        self.output_zero = constants.scalar(-LOWEST, torch.uint8)

    def stored(self, codes: Tensor) -> Tensor:
        """Codes as the graph holds them."""
        return codes

    def summed(self, codes: Tensor) -> Tensor:
        """What z_g is multiplied with: sums of the codes."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """The dequantized weight, in the graph."""
        return dequantized(self.codes, self.scale, self.zero_point, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input and compute the output."""
        return self.compute(self.inputs(x))

    def compute(self, codes: Tensor) -> Tensor:
        """The output for codes that the quantizer made."""
        y = self.product(codes)
        step = self.inputs.step(y.ndim)
        if self.offset is None:
            return y * step + self.constant_term(y, step)
        y = coded(y, self.code_scale, self.output_zero)
        return y * (step * self.broadcast(self.output_step[None], y)) + self.constant_term(y, step)

    def output_bias(self) -> Tensor | None:
        """Dequantized integer bias of a quantized output, in the graph."""
        return None if self.offset is None else dequantized(self.offset, self.scale, self.offset_zero_point, 0)

    def product(self, codes: Tensor) -> Tensor:
        """W' u."""
        raise NotImplementedError

    def constant_term(self, y: Tensor, step: Tensor) -> Tensor:
        """What does not depend on the input: bias, its correction, and the zero point's share or the offset's."""
        if self.offset is not None:
            total = -self.broadcast(self.output_shift[None], y) * step
        elif self.inputs.centre is not None:
            total = torch.zeros_like(step)
        else:
            total = -self.zero_share(y) * (self.inputs.zero(y.ndim) * step)
        if self.correction is not None:
            total = total + self.broadcast(self.times.shift(self.correction, self.inputs.repeats), y)
        return total if self.bias is None else total + self.broadcast(self.bias[None], y)

    def zero_share(self, y: Tensor) -> Tensor:
        """W' 1, broadcastable to y."""
        raise NotImplementedError

    def broadcast(self, values: Tensor, y: Tensor) -> Tensor:
        """(B, O) beside an output."""
        shape = [-1] + [1] * (y.ndim - 1)  # the sizes are numbers in the graph, but for the batch
        shape[-1 if self.axis else 1] = self.out_channels
        return values.reshape(shape)


def _whole_bias(source: QuantLayer) -> Tensor | None:
    """Bias and what the input's shift contributes, which a model in a narrow type keeps apart, (O,) in float32."""
    parts = [part.detach().float() for part in (source.bias, source.shift_bias) if part is not None]
    return torch.stack(parts).sum(dim=0) if parts else None


def _smallest(sums: np.ndarray[Any, Any]) -> Tensor:
    """Integers as a constant of the graph, in 16 bits where they fit."""
    small = int(np.abs(sums).max()) < 2**15
    return torch.from_numpy(sums.astype(np.int16 if small else np.int32))


def _seen_taps(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> np.ndarray[Any, Any]:
    """(outputs, kernel) int64: 1 where a tap of the kernel meets the input, 0 where it meets the padding.

    >>> _seen_taps(4, 1, 1, 3, 1, 1).tolist()
    [[0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]]
    """
    outputs = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    place = np.arange(outputs)[:, None] * stride - before + np.arange(kernel) * dilation
    return ((place >= 0) & (place < size)).astype(np.int64)


class GraphConv2d(GraphLayer):
    """Convolution of codes."""

    axis = 0

    def __init__(self, source: QuantConv2d, *args: Any) -> None:
        super().__init__(source, *args)
        self.stride, self.padding, self.dilation = source.stride, source.padding, source.dilation
        self.groups, self.padding_mode, self.pad = source.groups, source.padding_mode, source._pad

    def summed(self, codes: Tensor) -> Tensor:
        """(O, 1, kh, kw) sums over the input channels."""
        return codes.sum(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """As for every layer; what is padded other than by zeros is padded before it is quantized."""
        return super().forward(x if self.padding_mode == "zeros" else F.pad(x, self.pad, mode=self.padding_mode))

    def product(self, codes: Tensor) -> Tensor:
        """(B, O, H', W')."""
        self.size = [int(size) for size in codes.shape[2:]]
        padding: Any = self.padding if self.padding_mode == "zeros" else 0
        return F.conv2d(codes, self.weight(), self.output_bias(), self.stride, padding, self.dilation, self.groups)

    def zero_share(self, y: Tensor) -> Tensor:
        """(1, O, H', W'), or (1, O, 1, 1) where no border sees less of it."""
        if self.padding_mode != "zeros" or not any(self.pad):
            sums = self.code_sums.sum(axis=(1, 2, 3))  # numpy: what is not traced is a constant of the graph
            return (_smallest(sums).float() * self.scale).reshape(1, -1, 1, 1)
        left, right, top, bottom = self.pad
        rows = _seen_taps(self.size[0], top, bottom, self.code_sums.shape[2], self.stride[0], self.dilation[0])
        columns = _seen_taps(self.size[1], left, right, self.code_sums.shape[3], self.stride[1], self.dilation[1])
        row_kinds, row_of = np.unique(rows, axis=0, return_inverse=True)
        column_kinds, column_of = np.unique(columns, axis=0, return_inverse=True)
        sums = np.einsum("oikl,rk,cl->orc", self.code_sums, row_kinds, column_kinds)
        share = _smallest(sums).float() * self.scale[:, None, None]
        share = share.index_select(1, torch.from_numpy(row_of.reshape(-1)))
        return share.index_select(2, torch.from_numpy(column_of.reshape(-1)))[None]


class GraphLinear(GraphLayer):
    """Matrix product of codes; the weight is stored as (I, O), as MatMul takes it."""

    axis = 1

    def __init__(self, source: QuantLinear, *args: Any) -> None:
        super().__init__(source, *args)

    def stored(self, codes: Tensor) -> Tensor:
        """(I, O)."""
        return codes.t().contiguous()

    def summed(self, codes: Tensor) -> Tensor:
        """(O,) sums over the inputs."""
        return codes.sum(dim=1)

    def product(self, codes: Tensor) -> Tensor:
        """(B, ..., O)."""
        y = torch.matmul(codes, self.weight())
        bias = self.output_bias()
        return y if bias is None else y + bias

    def zero_share(self, y: Tensor) -> Tensor:
        """(1, ..., O)."""
        return (_smallest(self.code_sums).float() * self.scale).reshape(*[1] * (y.ndim - 1), -1)


GRAPH_LAYERS: dict[type[QuantLayer], type[GraphLayer]] = {QuantConv2d: GraphConv2d, QuantLinear: GraphLinear}
"""Quantized layers and what they become in the graph. Extend to export another kind."""
