"""Joint attention of image and context, of Stable Diffusion 3."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tcaq_lightning.nn.attention.operations import norm_heads
from tcaq_lightning.nn.attention.processor import ADDED, PROCESSORS, SELF, QuantAttnProcessor


@PROCESSORS.register("JointAttnProcessor2_0")
@PROCESSORS.register("FusedJointAttnProcessor2_0")
class QuantJointAttnProcessor(QuantAttnProcessor):
    """What `JointAttnProcessor2_0` computes (Stable Diffusion 3): image and context attend to both."""

    variants: ClassVar[tuple[str, ...]] = ("XFormersJointAttnProcessor",)

    @classmethod
    def same_input(cls, attn: Any) -> list[tuple[str, ...]]:
        """Names of the projections that read one tensor, for each such tensor."""
        return [SELF] if attn.added_kv_proj_dim is None else [SELF, ADDED]

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What diffusers' processor computes, every operand of its matmuls quantized."""
        count = hidden_states.shape[1]
        q, k, v = self.joint(attn, hidden_states, encoder_hidden_states)
        out = self.attend(q, k, v, attn.heads, None).to(hidden_states.dtype)
        image: Tensor = attn.to_out[1](attn.to_out[0](out[:, :count]))
        if encoder_hidden_states is None:
            return image
        context = out[:, count:]
        return image, context if attn.context_pre_only else attn.to_add_out(context)

    def joint(self, attn: Any, tokens: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the image's tokens, followed by those of the context."""
        q, k, v = self.project(attn, tokens, SELF)
        q, k = norm_heads(q, attn.norm_q, attn.heads), norm_heads(k, attn.norm_k, attn.heads)
        if context is None:
            return q, k, v
        added_q, added_k, added_v = self.project(attn, context, ADDED)
        added_q = norm_heads(added_q, attn.norm_added_q, attn.heads)
        added_k = norm_heads(added_k, attn.norm_added_k, attn.heads)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q, added_q), (k, added_k), (v, added_v)))
        return q, k, v
