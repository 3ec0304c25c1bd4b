"""Joint attention with rotated positions, of Flux."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tcaq_lightning.nn.attention.joint import QuantJointAttnProcessor
from tcaq_lightning.nn.attention.operations import mask_by_head, rotate_heads
from tcaq_lightning.nn.attention.processor import PROCESSORS


@PROCESSORS.register("FluxAttnProcessor")
class QuantFluxAttnProcessor(QuantJointAttnProcessor):
    """What `FluxAttnProcessor` computes: the context's tokens come first, and positions are rotations of q and k."""

    variants: ClassVar[tuple[str, ...]] = ()

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Run the attention; diffusers reads this signature to know which arguments it may pass."""
        return nn.Module.__call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def forward(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        image_rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What diffusers' processor computes, every operand of its matmuls quantized."""
        count = hidden_states.shape[1]
        joined = self.joint(attn, hidden_states, encoder_hidden_states)
        q, k, v = (torch.cat([x[:, count:], x[:, :count]], dim=1) for x in joined)
        if image_rotary_emb is not None:
            q, k = (rotate_heads(x, image_rotary_emb, attn.heads) for x in (q, k))
        mask = mask_by_head(attention_mask, q.shape[0], attn.heads, (q.shape[1], k.shape[1]))
        out = self.attend(q, k, v, attn.heads, mask).to(hidden_states.dtype)
        if encoder_hidden_states is None:
            return out
        context, image = out[:, :-count], out[:, -count:]
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(context)
