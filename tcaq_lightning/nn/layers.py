"""Quantized layers with weights: convolution and linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcaq_lightning.nn.dequantized import DequantizedWeight
from tcaq_lightning.nn.spec import LayerSpec
from tcaq_lightning.quantizers import (
    ActivationQuantizer,
    AdaRoundWeight,
    OutputQuantizer,
    Rounding,
    StoredTensor,
    WeightQuantizer,
)
from tcaq_lightning.quantizers.activation import along, of_groups, per_sample
from tcaq_lightning.quantizers.output import OUTPUT_BITS
from tcaq_lightning.quantizers.uniform import keeping_type
from tcaq_lightning.runtime.offloading import reading
from tcaq_lightning.runtime.precision import autocast_type


class SharedInput:
    """A tensor that several layers read: the first of them quantizes it for all that share its quantizer."""

    def __init__(self) -> None:
        self._read: tuple[ActivationQuantizer, Tensor, Tensor] | None = None

    def quantized(self, quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
        """What the quantizer makes of x, which is what it made of it before."""
        if self._read is None or self._read[0] is not quantizer or self._read[1] is not x:
            self._read = quantizer, x, quantizer(x)
        return self._read[2]


class QuantLayer(nn.Module):
    """A layer with weights whose input and weight are quantized.

    Whatever the model's type, what is quantized is computed in float32: narrow types cannot hold its grids. The output
    has the model's type again.

    Attributes:
        integer_output: whether some engine has no integer kernel of its kind that gives floats (ONNX Runtime for a
            convolution; its matrix product gives floats, and is faster so).
        spec: what it was built from.
        dtype: of the output, that of the full-precision layer.
        input_quantizer: quantizer of the input; q, k and v projections of one tensor share it.
        weight_quantizer: maps r to the dequantized weight.
        output_quantizer: of the output before the bias, or None where that stays in floating point.
        bias: (O,) or None, in full precision.
        bias_shift: (G, O) correction of the output's mean error for each timestep group, or None.
        shift_bias: (O,) what the input's shift contributes to the output, W shift in full precision, or None. Once the
            weights are integers it is part of the bias.
    """

    channel_dim: int
    integer_output: bool = False
    bias_shift: Tensor | None
    shift_bias: Tensor | None

    def __new__(cls, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        """peft makes convolutions of the class of the layer beside them, from numbers of channels: ordinary ones."""
        return cls.__bases__[-1](source, *args, **kwargs) if isinstance(source, int) else super().__new__(cls)

    def __init__(
        self,
        weight_quantizer: WeightQuantizer,
        input_quantizer: ActivationQuantizer,
        bias: Tensor | None,
        name: str,
        spec: LayerSpec,
    ) -> None:
        nn.Module.__init__(self)  # past the layer that it stands for, whose parameters it has not
        self.name = name
        self.spec = spec
        self.dtype = torch.float32
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.output_quantizer: OutputQuantizer | None = None
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_buffer("bias_shift", None)
        self.register_buffer("shift_bias", None)

    @property
    def learned_weight(self) -> AdaRoundWeight:
        """The weight with its rounding variables; only while calibrating."""
        assert self.weight_quantizer.learns
        return cast("AdaRoundWeight", self.weight_quantizer)

    @property
    def out_channels(self) -> int:
        """O."""
        return self.weight_quantizer.out_channels

    @property
    def weight(self) -> Tensor:
        """(O, I, ...) as the layer multiplies with it now, for code that reads a layer's weight itself.

        That of a finished layer is dequantized when it is used, and cannot be written to.
        """
        quantizer = self.weight_quantizer
        if quantizer.learns:
            return self._weight().to(self.dtype)
        return DequantizedWeight(self._fixed_weight, quantizer.shape, self.dtype, quantizer.scale.device)

    @torch.no_grad()
    def _fixed_weight(self) -> Tensor:
        return self._weight().to(self.dtype)

    def _weight(self) -> Tensor:
        inputs = self.input_quantizer
        weight: Tensor = self.weight_quantizer(reading(inputs, inputs.scales))
        return weight

    def extra_repr(self) -> str:
        """For `print(denoiser)`: what a layer of its kind says is partly not true of it."""
        return f"{self.name}, {self.spec.widths}"

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """What the artifact holds of it beside its quantizers."""
        found = [
            StoredTensor.plain(name, tensor)
            for name, tensor in (("bias", self.bias), ("shift_bias", self.shift_bias))
            if tensor is not None
        ]
        if self.bias_shift is not None:
            found.append(StoredTensor("bias_shift", self.bias_shift, "bias_shifts", torch.float16))
        return tuple(found)

    def describe(self, input_of: str | None = None) -> LayerSpec:
        """Its spec with what calibration has found; `input_of` names the layer whose input quantizer it shares."""
        weight, inputs = self.weight_quantizer, self.input_quantizer
        return replace(
            self.spec,
            weight_bits=weight.bits,
            activation_bits=inputs.bits,
            symmetric=weight.symmetric,
            reparameterized=inputs.reparameterized,
            shifted=inputs.shift is not None,
            bias_shift=self.bias_shift is not None,
            input_of=input_of,
            input_quantizer=inputs.kind,
            quantized_output=self.output_quantizer is not None,
            weight_format=weight.number_format.name,
            weight_granularity=weight.number_format.granularity,
        )

    def begin_learning(self, rounding: Rounding) -> dict[str, list[nn.Parameter]]:
        """Make the weight and the output's steps learnable; returns the new parameters by kind."""
        learned = self.learned_weight.begin_learning(rounding, self.input_quantizer.r)
        if self.output_quantizer is not None and self.input_quantizer.headroom == 1:
            learned |= self.output_quantizer.begin_learning()
        return learned

    def end_learning(self) -> None:
        """Fold what was learned into the weight and the output's quantizer."""
        self.learned_weight.end_learning()
        if self.output_quantizer is not None:
            self.output_quantizer.end_learning()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLayer:
        """Where `to`, `half`, `bfloat16` end up: a change of type is one of the output alone."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(keeping_type(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def allow_bias_shift(self) -> None:
        """Give the layer a (G, O) bias correction, zero until it is set."""
        groups = self.input_quantizer.groups.num_groups
        scale = self.weight_quantizer.scales()
        self.register_buffer("bias_shift", scale.new_zeros(groups, self.out_channels))

    def quantize_output(self) -> None:
        """Give the layer a quantizer of its output, neutral until it is set.

        The input then gets one zero point for all timestep groups: it is a constant of the integer kernel, and its
        codes in all groups must fit into 8 bits around it. Narrower ones do with zero points of their own.
        """
        self.input_quantizer.constant_zero = self.input_quantizer.bits == OUTPUT_BITS
        quantizer = OutputQuantizer(self.out_channels, self.channel_dim)
        self.output_quantizer = quantizer.to(self.weight_quantizer.scale.device).train(self.training)

    @torch.no_grad()
    def search_weight(self) -> None:
        """Search the weight's grid for the input's r; the output keeps its range."""
        before = self.learned_weight.scale.clone()
        self.learned_weight.search(self.input_quantizer.r)
        if self.output_quantizer is not None:
            self.output_quantizer.rescale(before, self.learned_weight.scale)

    @torch.no_grad()
    def search_output(self, quantized: Tensor) -> None:
        """Search the output's range, after those of the input and the weight.

        Args:
            quantized: input that is quantized already, (B, ...), each sample by its timestep group.
        """
        if self.output_quantizer is not None:
            y = self.linear_map(quantized, self._weight(), None)
            scale, headroom = self.weight_quantizer.scale, self.input_quantizer.headroom
            self.output_quantizer.search(y / self._input_step(y), scale, headroom, self.learned_weight.norm)

    def _input_step(self, y: Tensor) -> Tensor:
        """The input's step for each sample, beside an output."""
        inputs = self.input_quantizer
        return per_sample(reading(inputs, inputs.steps), self.input_quantizer.groups.of_rows(y.shape[0]), y.ndim)

    @staticmethod
    def is_pointwise(source: Any) -> bool:
        """Whether every output of a full-precision layer sees its inputs whole.

        A shift of the input is then a constant of the output.
        """
        raise NotImplementedError

    def allow_shift(self) -> None:
        """Give the layer a contribution of its input's shift, zero until it is set."""
        self.register_buffer("shift_bias", self.weight_quantizer.scales().new_zeros(self.out_channels))

    @torch.no_grad()
    def set_shift(self) -> None:
        """Take over the input quantizer's shift."""
        shift = self.input_quantizer.shift
        if shift is not None and self.shift_bias is not None:
            weight = self.learned_weight.weight
            constant = along(shift, weight.ndim - 1, 0)  # (C, 1, 1) or (C,): one pixel, one token
            self.shift_bias.copy_(self.linear_map(constant[None], weight, None).flatten())

    @torch.no_grad()
    def fold_shift(self) -> None:
        """Make what the shift contributes part of the bias; the same bits come out.

        A model in a narrower type keeps the two apart: its bias could not hold the sum.
        """
        if self.shift_bias is not None and self.shift_bias.dtype == self.dtype:
            bias = self.shift_bias if self.bias is None else self.bias + self.shift_bias
            self.bias = nn.Parameter(bias, requires_grad=False)
            self.shift_bias = None

    def forward(self, input: Tensor, shared: SharedInput | None = None) -> Tensor:  # noqa: A002 - torch's own name
        """Quantize the input, unless a layer has done so that reads the same tensor, and compute the output."""
        quantizer = self.input_quantizer
        return self.compute(quantizer(input) if shared is None else shared.quantized(quantizer, input))

    def compute(self, quantized: Tensor) -> Tensor:
        """The layer's output for an input that is quantized already."""
        bias: Tensor | None = self.bias
        if self.shift_bias is not None:
            bias = self.shift_bias if bias is None else bias + self.shift_bias
        if self.output_quantizer is None:
            y = self.product(quantized, bias)
        else:
            y = self.product(quantized, None)
            scales = reading(self.weight_quantizer, self.weight_quantizer.scales)
            y = self.output_quantizer(y, self._input_step(y), scales)
            if bias is not None:
                y = y + along(bias, y.ndim, self.channel_dim)
        if self.bias_shift is not None:
            shift = of_groups(self.bias_shift, self.input_quantizer.groups.of_rows(y.shape[0]))  # (B, O)
            shape = [shift.shape[0]] + [1] * (y.ndim - 1)
            shape[self.channel_dim] = -1
            shift = shift.view(shape)
            in_place = y.dtype is shift.dtype and len(y) == len(shift)  # nothing else holds y
            y = y.add_(shift) if in_place else y + shift
        return y if self.dtype is torch.float32 else y.to(self.dtype)

    def product(self, quantized: Tensor, bias: Tensor | None) -> Tensor:
        """The operation on a quantized input and the layer's own weight."""
        return self.linear_map(quantized, self._weight(), bias)

    def linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The full-precision operation with a given weight, in the wider of both operands' types, or autocast's."""
        if autocast_type(x) is not None:
            return self.operation(x, weight, bias)
        dtype = torch.promote_types(x.dtype, weight.dtype)
        return self.operation(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The full-precision operation on operands of one type."""
        raise NotImplementedError


class QuantConvolution(QuantLayer):
    """A quantized convolution, whatever the number of its axes.

    Attributes:
        function: of torch, that computes it.
    """

    channel_dim = 1
    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, source: Any, *args: Any) -> None:
        super().__init__(*args)
        self.dtype = source.weight.dtype
        self.stride, self.padding, self.dilation = source.stride, source.padding, source.dilation
        self.groups, self.padding_mode = source.groups, source.padding_mode
        self.in_channels, self.kernel_size = source.in_channels, source.kernel_size
        self._pad = source._reversed_padding_repeated_twice

    @staticmethod
    def is_pointwise(source: Any) -> bool:
        """A kernel of one value without padding."""
        return all(size == 1 for size in source.kernel_size) and not any(source._reversed_padding_repeated_twice)

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with a given weight."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pad, mode=self.padding_mode), 0
        return type(self).function(x, weight, bias, self.stride, padding, self.dilation, self.groups)


class QuantConv2d(QuantConvolution, nn.Conv2d):  # type: ignore[misc, override]
    """Quantized `nn.Conv2d`."""

    integer_output = True
    function = staticmethod(F.conv2d)


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc, override]
    """Quantized `nn.Linear`."""

    channel_dim = -1

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """O."""
        return self.out_channels

    def __init__(self, source: nn.Linear, *args: Any) -> None:
        super().__init__(*args)
        self.dtype = source.weight.dtype
        self.in_features = source.in_features

    @staticmethod
    def is_pointwise(source: Any) -> bool:  # noqa: ARG004
        """Always."""
        return True

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The affine map with a given weight."""
        return F.linear(x, weight, bias)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer without the adapters that peft has put around it."""
    while (inner := module._modules.get("base_layer")) is not None:
        module = inner
    return module


LAYERS: dict[type[nn.Module], type[QuantLayer]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
"""Layers with weights, and what replaces them. Extend to add a kind."""
