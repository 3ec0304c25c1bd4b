"""Quantized layers: convolution, linear, and attention with its probabilities and both matmuls."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tcaq_lightning.quantizers import ActivationQuantizer, AdaRoundWeight, IntegerWeight, SoftmaxQuantizer
from tcaq_lightning.quantizers.activation import along
from tcaq_lightning.timesteps import TimestepGroups


class QuantLayer(nn.Module):
    """A layer with weights whose input and weight are quantized.

    Attributes:
        input_quantizer: quantizer of the input; q, k and v projections of one tensor share it.
        weight_quantizer: maps r to the dequantized weight.
        bias: (O,) or None, in full precision.
        bias_shift: (G, O) correction of the output's mean error for each timestep group, or None.
        shift_bias: (O,) what the input's shift contributes to the output, W shift in full precision, or None. Once the
            weights are integers it is part of the bias.
    """

    channel_dim: int
    bias_shift: Tensor | None
    shift_bias: Tensor | None

    def __init__(
        self,
        weight_quantizer: AdaRoundWeight | IntegerWeight,
        input_quantizer: ActivationQuantizer,
        bias: Tensor | None,
        name: str,
    ) -> None:
        super().__init__()
        self.name = name
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_buffer("bias_shift", None)
        self.register_buffer("shift_bias", None)

    @property
    def learned_weight(self) -> AdaRoundWeight:
        """The weight with its rounding variables; only while calibrating."""
        assert isinstance(self.weight_quantizer, AdaRoundWeight)
        return self.weight_quantizer

    @property
    def out_channels(self) -> int:
        """O."""
        weight = self.weight_quantizer
        return (weight.weight if isinstance(weight, AdaRoundWeight) else weight.codes).shape[0]

    def allow_bias_shift(self) -> None:
        """Give the layer a (G, O) bias correction, zero until it is set."""
        groups = self.input_quantizer.groups.num_groups
        scale = self.weight_quantizer.scale
        self.register_buffer("bias_shift", scale.new_zeros(groups, self.out_channels))

    @property
    def pointwise(self) -> bool:
        """Whether every output sees its inputs whole: a shift of the input is then a constant of the output."""
        raise NotImplementedError

    def allow_shift(self) -> None:
        """Give the layer a contribution of its input's shift, zero until it is set."""
        self.register_buffer("shift_bias", self.weight_quantizer.scale.new_zeros(self.out_channels))

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
        """Make what the shift contributes part of the bias; the same bits come out."""
        if self.shift_bias is not None:
            bias = self.shift_bias if self.bias is None else self.bias + self.shift_bias
            self.bias = nn.Parameter(bias, requires_grad=False)
            self.shift_bias = None

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input and compute the output."""
        return self.compute(self.input_quantizer(x))

    def compute(self, quantized: Tensor) -> Tensor:
        """The layer's output for an input that is quantized already."""
        bias: Tensor | None = self.bias
        if self.shift_bias is not None:
            bias = self.shift_bias if bias is None else bias + self.shift_bias
        y = self.linear_map(quantized, self.weight_quantizer(self.input_quantizer.scales()), bias)
        if self.bias_shift is None:
            return y
        shift = self.bias_shift[self.input_quantizer.groups.current]  # (B, O)
        shape = [y.shape[0]] + [1] * (y.ndim - 1)
        shape[self.channel_dim] = -1
        return y + shift.view(shape)

    def linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The full-precision operation with a given weight."""
        raise NotImplementedError


class QuantConv2d(QuantLayer):
    """Quantized `nn.Conv2d`."""

    channel_dim = 1

    def __init__(self, source: nn.Conv2d, *args: Any) -> None:
        super().__init__(*args)
        self.stride, self.padding, self.dilation = source.stride, source.padding, source.dilation
        self.groups, self.padding_mode = source.groups, source.padding_mode
        self.in_channels = source.in_channels
        self.kernel_size = source.kernel_size
        self._pad = source._reversed_padding_repeated_twice

    @property
    def pointwise(self) -> bool:
        """A 1 x 1 kernel without padding."""
        return all(size == 1 for size in self.kernel_size) and not any(self._pad)

    def linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with a given weight."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pad, mode=self.padding_mode), 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


class QuantLinear(QuantLayer):
    """Quantized `nn.Linear`."""

    channel_dim = -1

    def __init__(self, source: nn.Linear, *args: Any) -> None:
        super().__init__(*args)
        self.in_features = source.in_features

    @property
    def pointwise(self) -> bool:
        """Always."""
        return True

    def linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The affine map with a given weight."""
        return F.linear(x, weight, bias)


class QuantAttnProcessor(nn.Module):
    """Processor of a diffusers `Attention` that computes attention in the open, with every operand quantized.

    The fused attention call hides the probabilities, so none is used here. The projections are quantized layers of the
    `Attention` itself; where q, k and v read one tensor they share its quantizer, which then runs once.

    Attributes:
        query, key, value: quantizers of the operands of q k^T and P v. probabilities: DAQ's quantizer of P.
    """

    def __init__(self, bits: int, softmax_bits: int, groups: TimestepGroups) -> None:
        super().__init__()
        self.query = ActivationQuantizer(bits, groups)
        self.key = ActivationQuantizer(bits, groups)
        self.value = ActivationQuantizer(bits, groups)
        self.probabilities = SoftmaxQuantizer(softmax_bits, groups)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Run the attention; diffusers reads this signature to know which arguments it may pass."""
        output: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return output

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor:
        """What diffusers' `AttnProcessor2_0` computes, every operand of its matmuls quantized."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (B, H*W, C)
        batch = hidden_states.shape[0]
        if attention_mask is not None:
            source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            attention_mask = attn.prepare_attention_mask(attention_mask, source.shape[1], batch)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if encoder_hidden_states is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(encoder_hidden_states)
        else:
            context = encoder_hidden_states
        q, k, v = self._project(attn, hidden_states, context)
        out = self._attend(attn, q, k, v, attention_mask)  # (B, T, C)

        out = attn.to_out[1](attn.to_out[0](out))
        if image_shape is not None:
            out = out.transpose(1, 2).reshape(image_shape[0], -1, *image_shape[2:])
        if attn.residual_connection:
            out = out + residual
        output: Tensor = out / attn.rescale_output_factor
        return output

    def _attend(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(d)) v of projections (B, T, C) and (B, S, C), by heads."""
        batch = q.shape[0]
        q, k, v = self.query(q), self.key(k), self.value(v)
        q, k, v = (attn.head_to_batch_dim(x) for x in (q, k, v))  # (B*heads, T, C/heads)
        p = attn.get_attention_scores(q, k, attention_mask)  # (B*heads, T, S)
        p = self.probabilities(torch.unflatten(p, 0, (batch, -1))).flatten(0, 1)
        return attn.batch_to_head_dim(torch.bmm(p, v))

    @staticmethod
    def _project(attn: Attention, hidden_states: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if context is hidden_states and shares_input_quantizer(attn):
            to_q, to_k, to_v = cast("list[QuantLayer]", [attn.to_q, attn.to_k, attn.to_v])
            quantized = to_q.input_quantizer(hidden_states)
            return to_q.compute(quantized), to_k.compute(quantized), to_v.compute(quantized)
        return attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)


def shares_input_quantizer(attn: Attention) -> bool:
    """Whether q, k and v are quantized layers that read one quantized tensor."""
    layers = (attn.to_q, attn.to_k, attn.to_v)
    if not all(isinstance(layer, QuantLayer) for layer in layers):
        return False
    return attn.to_q.input_quantizer is attn.to_k.input_quantizer is attn.to_v.input_quantizer
