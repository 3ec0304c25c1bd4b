"""The quantized attention that others derive from: plain self- and cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tcaq_lightning.nn.attention.operations import (
    as_tokens,
    attention_probabilities,
    norm_heads,
    prepared_by_head,
    shares_input_quantizer,
    split_heads,
)
from tcaq_lightning.nn.layers import SharedInput
from tcaq_lightning.nn.spec import AttentionSpec
from tcaq_lightning.quantizers import ACTIVATION_QUANTIZERS, SoftmaxQuantizer
from tcaq_lightning.quantizers.activation import widened
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.quantizers.uniform import keeping_type
from tcaq_lightning.runtime.registry import Registry

PROCESSORS: Registry[type[QuantAttnProcessor]] = Registry("attention processor")
"""By class name of a diffusers processor, the one that computes the same with quantized operands."""

SELF = ("to_q", "to_k", "to_v")
"""Projections of an attention's own tokens."""
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
"""Projections of a context beside them."""


@PROCESSORS.register("AttnProcessor")
@PROCESSORS.register("AttnProcessor2_0")
@PROCESSORS.register("FusedAttnProcessor2_0")
class QuantAttnProcessor(nn.Module):
    """Processor of a diffusers attention that computes it in the open, with every operand quantized.

    The fused attention call hides the probabilities, so none is used here. The projections are quantized layers of the
    attention itself; those that read one tensor share its quantizer, which then runs once. This one computes what
    `AttnProcessor2_0` does: plain self- and cross-attention; others derive from it and share its steps `project`,
    `attend` and `merge`.

    Args:
        spec: bits, kind of quantizers, and the diffusers processor that it stands for.
        groups: timestep groups of the denoiser.

    Attributes:
        variants: class names of further diffusers processors that compute the same, only in less memory or faster.
        query: quantizer of q, an operand of q k^T.
        key: of k, the other one.
        value: of v, an operand of P v.
        probabilities: of P, the other one, whose kind DAQ chooses.
        normalizes: whether the attention's norms of q and k are applied; `AttnProcessor` knows none.
    """

    variants: ClassVar[tuple[str, ...]] = (
        "AttnProcessorNPU",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    )

    def __init__(self, spec: AttentionSpec, groups: TimestepGroups) -> None:
        super().__init__()
        operand = ACTIVATION_QUANTIZERS[spec.quantizer]
        self.spec = spec
        self.normalizes = spec.processor != "AttnProcessor"
        self.query = operand(spec.activation_bits, groups)
        self.key = operand(spec.activation_bits, groups)
        self.value = operand(spec.activation_bits, groups)
        self.probabilities = SoftmaxQuantizer(spec.softmax_bits, groups)

    def describe(self) -> AttentionSpec:
        """Its spec with the bits that it has now."""
        return replace(self.spec, activation_bits=self.query.bits, softmax_bits=self.probabilities.bits)

    def stands_for(self, attn: Any, processor: Any) -> bool:
        """Whether a processor of diffusers computes for an attention what this one does, but for the quantization.

        Where q and k have norms, some of them apply these and others do not.
        """
        kind = type(processor)
        if not kind.__module__.startswith("diffusers."):
            return False
        if kind.__name__ == self.spec.processor:
            return True
        if any(getattr(attn, norm, None) is not None for norm in ("norm_q", "norm_k")):
            return False
        same = {name for name, quantized in PROCESSORS.items() if quantized is type(self)}
        return kind.__name__ in same.union(self.variants)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantAttnProcessor:
        """Where `to` ends up: grids stay in float32."""
        super()._apply(keeping_type(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    @classmethod
    def same_input(cls, attn: Any) -> list[tuple[str, ...]]:
        """Names of the projections that read one tensor, for each such tensor."""
        return [("to_k", "to_v") if attn.is_cross_attention else SELF]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        """Run the attention; diffusers reads this signature to know which arguments it may pass."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
    ) -> Any:
        """What diffusers' processor computes, every operand of its matmuls quantized."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        tokens = as_tokens(hidden_states)
        source = tokens if encoder_hidden_states is None else encoder_hidden_states
        mask = attn.prepare_attention_mask(attention_mask, source.shape[1], tokens.shape[0])
        mask = prepared_by_head(mask, tokens.shape[0], attn.heads)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        tokens = tokens.contiguous()  # once, not in each projection
        if encoder_hidden_states is None:
            q, k, v = self.project(attn, tokens, SELF)
        else:
            context = attn.norm_encoder_hidden_states(source) if attn.norm_cross else source
            (q,), (k, v) = self.project(attn, tokens, SELF[:1]), self.project(attn, context, SELF[1:])
        if self.normalizes:
            q, k = norm_heads(q, attn.norm_q, attn.heads), norm_heads(k, attn.norm_k, attn.heads)
        out = self.attend(q, k, v, attn.heads, mask, attn.scale).to(tokens.dtype)
        return self.merge(attn, out, residual)

    def project(self, attn: Any, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Some of an attention's projections of one tensor, which is quantized once if they share its quantizer."""
        layers = [getattr(attn, name) for name in names]
        if len(layers) > 1 and shares_input_quantizer(layers):
            shared = SharedInput()
            return [layer(x, shared) for layer in layers]
        return [layer(x) for layer in layers]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, scale: float | None = None
    ) -> Tensor:
        """softmax(scale q k^T + mask) v, its operands quantized.

        Args:
            q: (B, T, heads * d).
            k: (B, S, heads * d).
            v: (B, S, heads * d).
            heads: number of heads.
            mask: added to the scores; broadcastable to (B * heads, T, S).
            scale: 1 / sqrt(d) unless given.

        Returns:
            (B, T, heads * d), in float32 where the operands' type is narrower.
        """
        batch = q.shape[0]
        q, k, v = (widened(x) for x in (self.query(q), self.key(k), self.value(v)))
        q, k, v = (split_heads(x, heads).flatten(0, 1) for x in (q, k, v))  # (B * heads, T, d)
        p = attention_probabilities(q, k, mask, q.shape[-1] ** -0.5 if scale is None else scale)
        p = self.quantize_probabilities(torch.unflatten(p, 0, (batch, -1))).flatten(0, 1)  # (B * heads, T, S)
        out = torch.unflatten(torch.bmm(p, v), 0, (batch, -1))  # (B, heads, T, d)
        return out.permute(0, 2, 1, 3).reshape(batch, out.shape[2], -1)

    def quantize_probabilities(self, p: Tensor) -> Tensor:
        """Quantize (k B, ..., T, S) probabilities, k rows in sequence of each of the B samples that are passing."""
        batch, rows = self.probabilities.groups.current.shape[0], p.shape[0]
        if rows == batch or batch == 1 or rows % batch:
            return self.probabilities(p)  # type: ignore[no-any-return]
        return self.probabilities(torch.unflatten(p, 0, (batch, -1))).flatten(0, 1)  # type: ignore[no-any-return]

    def merge(self, attn: Any, out: Tensor, residual: Tensor) -> Tensor:
        """Output projection, residual connection and rescaling, in the input's shape."""
        out = attn.to_out[1](attn.to_out[0](out))
        if residual.ndim == 4:
            out = out.transpose(1, 2).contiguous().view(residual.shape[0], -1, *residual.shape[2:])
        if attn.residual_connection:
            out = out + residual
        output: Tensor = out / attn.rescale_output_factor
        return output


def quantized_processor(module: nn.Module) -> QuantAttnProcessor | None:
    """The quantized processor of an attention, or the quantizers of its calls; None of any other module."""
    parts: tuple[Any, ...] = getattr(module, "processor", None), getattr(module, "operands", None)
    return next((part for part in parts if isinstance(part, QuantAttnProcessor)), None)


def processor_name(attention: Any) -> str:
    """Class name of an attention's processor; that of the attention itself if it has none."""
    processor = getattr(attention, "processor", None)
    return type(attention if processor is None else processor).__name__
