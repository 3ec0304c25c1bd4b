"""Attentions of diffusers that hand the weights of their layers to torch, written with the layers themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class PooledForward:
    """What `HunyuanDiTAttentionPool` computes: the mean token attends to itself and all others (Li et al. 2024)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, C')."""
        tokens = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (B, L + 1, C)
        tokens = tokens + self.positional_embedding.to(x.dtype)
        q, k, v = self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, T, d)
        out = F.scaled_dot_product_attention(q, k, v)
        pooled: Tensor = self.c_proj(out.transpose(1, 2).flatten(2)).squeeze(1)
        return pooled


REWRITTEN: dict[str, type] = {"HunyuanDiTAttentionPool": PooledForward}
"""Methods for attentions by class name. Off, they equal the original up to the order of float sums."""
