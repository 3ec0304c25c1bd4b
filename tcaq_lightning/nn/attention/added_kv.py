"""Attention to a context beside the image, with keys and values of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tcaq_lightning.nn.attention.operations import prepared_by_head
from tcaq_lightning.nn.attention.processor import ADDED, PROCESSORS, SELF, QuantAttnProcessor


@PROCESSORS.register("AttnAddedKVProcessor")
@PROCESSORS.register("AttnAddedKVProcessor2_0")
class QuantAddedKVAttnProcessor(QuantAttnProcessor):
    """What `AttnAddedKVProcessor2_0` computes: keys and values of the context beside those of the image."""

    variants: ClassVar[tuple[str, ...]] = ("SlicedAttnAddedKVProcessor", "XFormersAttnAddedKVProcessor")

    @classmethod
    def same_input(cls, attn: Any) -> list[tuple[str, ...]]:
        """Names of the projections that read one tensor, for each such tensor."""
        return [ADDED[1:]] if attn.only_cross_attention else [SELF, ADDED[1:]]

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor:
        """What diffusers' processor computes, every operand of its matmuls quantized."""
        tokens = hidden_states.flatten(2).transpose(1, 2)  # (B, H*W, C)
        mask = attn.prepare_attention_mask(attention_mask, tokens.shape[1], tokens.shape[0])
        mask = prepared_by_head(mask, tokens.shape[0], attn.heads)
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2).contiguous()
        k, v = self.project(attn, context, ADDED[1:])
        if attn.only_cross_attention:
            (q,) = self.project(attn, tokens, SELF[:1])
        else:
            q, own_k, own_v = self.project(attn, tokens, SELF)
            k, v = torch.cat([k, own_k], dim=1), torch.cat([v, own_v], dim=1)
        out = self.attend(q, k, v, attn.heads, mask, attn.scale).to(tokens.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        output: Tensor = out.transpose(1, 2).reshape(hidden_states.shape) + hidden_states
        return output
