"""The frozen denoiser as it is exported: QuantizeLinear and DequantizeLinear around integers as they are stored.

Every product of a quantized layer is taken of codes that an integer kernel can hold, with constant scales and zero
points; what depends on the timestep stands around it as cheap operations on floats:

    x^ = r s_g (u - z_g),  u = clip(round(x / (r s_g)) + z_g, 0, 2^b - 1)   the simulated input, METHOD section 1
    W x^ + b = s_g (W' u) + (b - s_g z_g W' 1)                              W' = scale (q - z), METHOD section 3

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

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcaq_lightning.attention import QuantAttnProcessor, is_attention
from tcaq_lightning.errors import UserError
from tcaq_lightning.layers import QuantConv2d, QuantLayer, QuantLinear
from tcaq_lightning.quantized_layers import quant_layers, set_submodule
from tcaq_lightning.quantizers import ActivationQuantizer, IntegerWeight, OutputQuantizer, SoftmaxQuantizer
from tcaq_lightning.quantizers.activation import along
from tcaq_lightning.quantizers.output import LOWEST
from tcaq_lightning.quantizers.weight import column
from tcaq_lightning.timesteps import TimestepHook


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


def _coded(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Quantize and dequantize, as the two operators."""
    codes = _Quantize.apply(x, scale, zero_point)  # type: ignore[no-untyped-call]
    values: Tensor = _Dequantize.apply(codes, scale, zero_point, 1)  # type: ignore[no-untyped-call]
    return values


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


class Timesteps(nn.Module):
    """What depends on the timestep: two tables with a row for each group, read once a call.

    Attributes:
        edges: (G - 1,) boundaries. values: (G, N) float32 steps, zero points and exponents.
        corrections: (G, M) float16 bias corrections.
    """

    edges: Tensor
    values: Tensor
    shifts: Tensor

    def __init__(self, boundaries: list[float]) -> None:
        super().__init__()
        self.num_groups = len(boundaries) + 1
        # OpenVINO sums nothing to anything, so that there always is a boundary
        self.register_buffer("edges", torch.tensor(boundaries or [float("inf")], dtype=torch.float32))
        self._columns: list[Tensor] = []
        self._corrections: list[Tensor] = []
        self._read: dict[int, tuple[Tensor, ...]] = {}
        self._corrected: tuple[Tensor, ...] = ()

    def column(self, values: Tensor) -> int:
        """Number of a new column of the first table, (G,) values."""
        self._columns.append(values.detach().float())
        return len(self._columns) - 1

    def correction(self, values: Tensor) -> int:
        """Number of a new block of the second table, (G, O) values."""
        self._corrections.append(values.detach().half())
        return len(self._corrections) - 1

    def finish(self) -> None:
        """Make the tables, after the last column."""
        groups = self.num_groups
        self.register_buffer("values", torch.stack([*self._columns, torch.zeros(groups)], dim=1))
        self.register_buffer("shifts", torch.cat([*self._corrections, torch.zeros(groups, 1).half()], dim=1))

    def set(self, timestep: Tensor) -> None:
        """Read the rows of a batch: timestep (B,) -> group, the number of boundaries at or below it."""
        group = (timestep.float()[:, None] >= self.edges).sum(dim=1)
        rows: Tensor = self.values[group]  # (B, N)
        self._read = {
            dims: torch.split(rows.reshape(-1, self.values.shape[1], *[1] * (dims - 2)), 1, dim=1) for dims in (2, 3, 4)
        }  # what is not used leaves the graph
        sizes = [block.shape[1] for block in self._corrections]
        self._corrected = torch.split(self.shifts[group].float(), [*sizes, 1], dim=1)

    def value(self, number: int, dims: int) -> Tensor:
        """(B, 1, ..., 1) of `dims` axes: a column's values for the running batch."""
        return self._read[dims][number]

    def shift(self, number: int) -> Tensor:
        """(B, O): a correction for the running batch."""
        return self._corrected[number]


class GraphQuantizer(nn.Module):
    """An `ActivationQuantizer` as QuantizeLinear and DequantizeLinear of constant scale and zero point.

    Attributes:
        signed: codes are int8, 2^(b-1) below the unsigned ones, for the second operand of a matmul of two activations.
        centre: zero point Z of the operators, the same for all groups, or None where zero points stand beside them.
    """

    shift: Tensor | None
    r: Tensor | None

    def __init__(
        self,
        source: ActivationQuantizer,
        times: Timesteps,
        constants: Constants,
        signed: bool = False,
        centred: bool = False,
    ) -> None:
        super().__init__()
        assert not (signed and centred)
        self.bits, self.channel_dim, self.times, self.signed = source.bits, source.channel_dim, times, signed
        self.levels = 2**source.bits - 1
        steps, zeros = source.steps().detach(), source.zero_point
        self.step_column = times.column(steps)
        self.zero_column = times.column(zeros)
        r = source.scales().detach()
        self.register_buffer("r", None if bool((r == 1).all()) else r)
        self.register_buffer("shift", source.shift)
        self.middle = 2 ** (source.bits - 1) if signed else 0
        self.upper = self.levels - self.middle
        self.code_scale = constants.scalar(1.0, torch.float32)
        self.centre = int(zeros.max()) if centred else None
        self.code_zero = constants.scalar(self.centre or 0, torch.int8 if signed else torch.uint8)
        self.one_zero = bool((zeros == zeros[0]).all())
        if self.centre is not None and self.centre - int(zeros.min()) + self.levels > 255:
            raise ValueError("an output is quantized, and its input's zero points are too far apart")

    def step(self, dims: int) -> Tensor:
        """Step s_g of the running batch, (B, 1, ..., 1)."""
        return self.times.value(self.step_column, dims)

    def zero(self, dims: int) -> Tensor:
        """z of the codes that come out, for the running batch."""
        zero = self.times.value(self.zero_column, dims)
        return zero - self.middle if self.middle else zero

    def forward(self, x: Tensor) -> Tensor:
        """Codes as floats, of x's shape: u, or u - 2^(b-1), or u - z_g around one zero point."""
        if self.shift is not None:
            x = x - along(self.shift, x.ndim, self.channel_dim)
        step = self.step(x.ndim)
        if self.r is not None:
            step = step * along(self.r, x.ndim, self.channel_dim)
        x = x / step
        if self.centre is not None:
            return _coded(self._within(x, self.centre), self.code_scale, self.code_zero)
        x = x + self.zero(x.ndim)
        if self.levels < 255:
            x = x.clamp(max=self.upper)
            if self.signed:
                x = x.clamp(min=-self.middle)
        return _coded(x, self.code_scale, self.code_zero)

    def _within(self, x: Tensor, centre: int) -> Tensor:
        """Keep x / step within the codes of its group, u - z_g."""
        if self.levels == 255:
            return x
        if self.one_zero:
            return x.clamp(-centre, self.levels - centre)
        zero = self.zero(x.ndim)
        return torch.minimum(torch.maximum(x, -zero), self.levels - zero)


class GraphLayer(nn.Module):
    """A `QuantLayer` on integer codes; subclasses say how they are multiplied.

    Attributes:
        codes: int8 q - z beside a `zero_point` of 0; uint8 q beside z where a code does not fit (8 bits, asymmetric).
        scale: (O,) of the codes; where the output is quantized, in steps of its.
        offset: (O,) integer bias n of a quantized output, or None.
        output_step: (O,) delta of a quantized output. output_shift: (O,) scale n of it.
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

    axis: int  # of the output channels within the stored codes

    def __init__(self, source: QuantLayer, inputs: GraphQuantizer, times: Timesteps, constants: Constants) -> None:
        super().__init__()
        weight = source.weight_quantizer
        if not isinstance(weight, IntegerWeight):
            raise ValueError(f"{source.name} still learns its rounding; call freeze(denoiser) before")
        self.name, self.bits, self.inputs, self.times = source.name, weight.bits, inputs, times
        self.out_channels = source.out_channels
        codes = weight.codes.int() - column(weight.zero_point, weight.codes).int()
        fits = int(codes.min()) >= -128 and int(codes.max()) <= 127
        self.register_buffer("codes", self.stored(codes.to(torch.int8) if fits else weight.codes))
        zero_point = weight.zero_point.to(torch.uint8)
        self.register_buffer("zero_point", torch.zeros_like(zero_point, dtype=torch.int8) if fits else zero_point)
        self.register_buffer("scale", weight.scale.clone())
        self.register_buffer("offset", None)
        if source.output_quantizer is not None:
            self._quantize_output(source.output_quantizer, constants)
        self.code_sums = self.summed(codes.long()).numpy()
        self.register_buffer("bias", None if source.bias is None else source.bias.detach())
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
        weight: Tensor = _Dequantize.apply(self.codes, self.scale, self.zero_point, self.axis)  # type: ignore[no-untyped-call]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input and compute the output."""
        return self.compute(self.inputs(x))

    def compute(self, codes: Tensor) -> Tensor:
        """The output for codes that the quantizer made."""
        y = self.product(codes)
        step = self.inputs.step(y.ndim)
        if self.offset is None:
            return y * step + self.constant_term(y, step)
        y = _coded(y, self.code_scale, self.output_zero)
        return y * (step * self.broadcast(self.output_step[None], y)) + self.constant_term(y, step)

    def output_bias(self) -> Tensor | None:
        """Dequantized integer bias of a quantized output, in the graph."""
        if self.offset is None:
            return None
        bias: Tensor = _Dequantize.apply(self.offset, self.scale, self.offset_zero_point, 0)  # type: ignore[no-untyped-call]
        return bias

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
            total = total + self.broadcast(self.times.shift(self.correction), y)
        return total if self.bias is None else total + self.broadcast(self.bias[None], y)

    def zero_share(self, y: Tensor) -> Tensor:
        """W' 1, broadcastable to y."""
        raise NotImplementedError

    def broadcast(self, values: Tensor, y: Tensor) -> Tensor:
        """(B, O) beside an output."""
        shape = [-1] + [1] * (y.ndim - 1)  # the sizes are numbers in the graph, but for the batch
        shape[-1 if self.axis else 1] = self.out_channels
        return values.reshape(shape)


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


class GraphSoftmaxQuantizer(nn.Module):
    """A `SoftmaxQuantizer`: codes where all groups are uniform, else its values by exact operations.

    Attributes:
        integer: codes come out, times nothing; else the quantized values.
    """

    def __init__(self, source: SoftmaxQuantizer, times: Timesteps, constants: Constants) -> None:
        super().__init__()
        self.bits, self.times = source.bits, times
        logarithmic = source.logarithmic()
        self.integer, self.mixed = not any(logarithmic), any(logarithmic) and not all(logarithmic)
        steps = source.steps().detach()
        self.delta_column = times.column(steps)
        self.tau_column = times.column(source.tau)
        self.one = constants.scalar(1.0, torch.float32)
        self.nought = constants.scalar(0, torch.uint8)

    def step(self) -> Tensor:
        """Uniform step of the running batch."""
        return self.times.value(self.delta_column, 4)

    def forward(self, p: Tensor) -> Tensor:
        """(B, heads, T, S) probabilities to codes or values."""
        if self.integer:
            return self._codes(p)
        delta, tau = self.times.value(self.delta_column, 4), self.times.value(self.tau_column, 4)
        if not self.mixed:
            return self._logarithmic(p, delta, tau)
        uniform = torch.round(p / delta).clamp(0, 2**self.bits - 1) * delta
        return torch.where(tau > 0, self._logarithmic(p, delta, torch.where(tau > 0, tau, 1.0)), uniform)

    def _logarithmic(self, p: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
        """`log_fake_quantize` in operators that ONNX has: it knows no exp2."""
        last = 2**self.bits - 1
        codes = torch.round(-torch.log2(p / delta) / tau).clamp(0, last)
        values: Tensor = torch.pow(2.0, -tau * codes) * delta * (last - codes).clamp(max=1)
        return values

    def _codes(self, p: Tensor) -> Tensor:
        x = p / self.step()
        if self.bits < 8:
            x = x.clamp(max=2**self.bits - 1)
        return _coded(x, self.one, self.nought)


class GraphAttnProcessor(QuantAttnProcessor):
    """A `QuantAttnProcessor` with both matmuls on codes: the first operand uint8, the second int8.

    (a - z_a)(b - z_b) = a b - z_a sum(b) - sum(a) z_b + K z_a z_b: the sums are over the axis that the product sums.
    """

    def __init__(self, source: QuantAttnProcessor, times: Timesteps, constants: Constants) -> None:
        nn.Module.__init__(self)
        self.query = GraphQuantizer(source.query, times, constants)  # type: ignore[assignment]
        self.key = GraphQuantizer(source.key, times, constants, signed=True)  # type: ignore[assignment]
        self.value = GraphQuantizer(source.value, times, constants, signed=True)  # type: ignore[assignment]
        self.probabilities = GraphSoftmaxQuantizer(source.probabilities, times, constants)  # type: ignore[assignment]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, scale: float | None = None
    ) -> Tensor:
        """As in `QuantAttnProcessor`."""
        query, key, value, probabilities = self._quantizers()
        q, k, v = (self._by_heads(x, heads) for x in (q, k, v))  # (B, heads, T, C/heads)
        scale = int(q.shape[-1]) ** -0.5 if scale is None else scale
        scores = self._product(query, q, key, k.transpose(2, 3)) * (query.step(4) * key.step(4) * scale)
        if mask is not None:
            scores = scores + torch.unflatten(mask, 0, (-1, heads))
        p = probabilities(scores.softmax(dim=-1))  # (B, heads, T, S)
        if probabilities.integer:
            v = value(v)
            out = torch.matmul(p, v) - value.zero(4) * p.sum(dim=-1, keepdim=True)
            out = out * (probabilities.step() * value.step(4))
        else:
            out = torch.matmul(p, (value(v) - value.zero(4)) * value.step(4))
        heads, tokens, width = (int(size) for size in out.shape[1:])
        merged: Tensor = out.transpose(1, 2).reshape(-1, tokens, heads * width)
        return merged

    @staticmethod
    def _by_heads(x: Tensor, heads: int) -> Tensor:
        tokens, channels = (int(size) for size in x.shape[1:])
        return x.reshape(-1, tokens, heads, channels // heads).transpose(1, 2)

    @staticmethod
    def _product(first: GraphQuantizer, a: Tensor, second: GraphQuantizer, b: Tensor) -> Tensor:
        """Product of (B, heads, T, K) and (B, heads, K, S) in steps of both, zero points taken off."""
        a, b = first(a), second(b)
        zero_a, zero_b = first.zero(4), second.zero(4)
        product = torch.matmul(a, b) - zero_b * a.sum(dim=-1, keepdim=True)
        return product - zero_a * (b - zero_b).sum(dim=-2, keepdim=True)

    def project(self, attn: Any, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """As in `QuantAttnProcessor`."""
        layers: list[Any] = [getattr(attn, name) for name in names]
        if all(isinstance(layer, GraphLayer) and layer.inputs is layers[0].inputs for layer in layers):
            codes = layers[0].inputs(x)
            return [layer.compute(codes) for layer in layers]
        return [layer(x) for layer in layers]

    def _quantizers(self) -> tuple[GraphQuantizer, GraphQuantizer, GraphQuantizer, GraphSoftmaxQuantizer]:
        quantizers: Any = (self.query, self.key, self.value, self.probabilities)
        return quantizers  # type: ignore[no-any-return]


GRAPH_LAYERS: dict[type[QuantLayer], type[GraphLayer]] = {QuantConv2d: GraphConv2d, QuantLinear: GraphLinear}
"""Quantized layers and what they become in the graph. Extend to export another kind."""
GRAPH_PROCESSORS = (QuantAttnProcessor,)
"""Processors that `GraphAttnProcessor` computes: plain self- and cross-attention."""


class GraphDenoiser(nn.Module):
    """A denoiser to be traced: (sample, timestep, further inputs) -> prediction, all tensors.

    Attributes:
        denoiser: a copy of the frozen one, its quantized parts replaced; the original stays as it is.
        names: names of the further inputs in the denoiser's `forward`.
    """

    def __init__(self, denoiser: nn.Module, boundaries: list[float], names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.denoiser, self.names = copy.deepcopy(denoiser), names
        for number, hook in list(self.denoiser._forward_pre_hooks.items()):
            if isinstance(hook, TimestepHook):
                del self.denoiser._forward_pre_hooks[number]
                self.denoiser._forward_pre_hooks_with_kwargs.pop(number, None)
        self.times, self.constants = Timesteps(boundaries), Constants()
        self._replace()
        self.times.finish()

    def forward(self, sample: Tensor, timestep: Tensor, *further: Tensor) -> Tensor:
        """Prediction of (B, ...) samples at timesteps (B,)."""
        self.times.set(timestep)
        inputs = dict(zip(self.names, further, strict=True))
        prediction: Tensor = self.denoiser(sample, timestep, **inputs, return_dict=False)[0]
        return prediction

    def _replace(self) -> None:
        made: dict[int, GraphQuantizer] = {}
        layers = quant_layers(self.denoiser).values()
        centred_inputs = {id(m.input_quantizer) for m in layers if m.output_quantizer is not None}
        for name, module in list(self.denoiser.named_modules()):
            if isinstance(module, QuantLayer):
                replacement = GRAPH_LAYERS.get(type(module))
                if replacement is None:
                    raise UserError(
                        f"unsupported layer {name} ({type(module).__name__}): expected one of "
                        f"{', '.join(kind.__name__ for kind in GRAPH_LAYERS)}; keep it in full precision with a rule: "
                        f"quantization.rules: [{{pattern: {name}, keep: true}}]"
                    )
                source = module.input_quantizer
                if id(source) not in made:
                    centred = id(source) in centred_inputs
                    made[id(source)] = GraphQuantizer(source, self.times, self.constants, centred=centred)
                layer = replacement(module, made[id(source)], self.times, self.constants)
                set_submodule(self.denoiser, name, layer)
            elif is_attention(module) and isinstance(module.processor, QuantAttnProcessor):
                if type(module.processor) not in GRAPH_PROCESSORS:
                    raise UserError(
                        f"unsupported attention {name} ({type(module.processor).__name__}): expected one of "
                        f"{', '.join(kind.__name__ for kind in GRAPH_PROCESSORS)}; keep it in full precision with a "
                        f"rule: quantization.rules: [{{pattern: {name}, keep: true}}]"
                    )
                processor: Any = GraphAttnProcessor(module.processor, self.times, self.constants)
                owner: Any = module
                owner.set_processor(processor)
