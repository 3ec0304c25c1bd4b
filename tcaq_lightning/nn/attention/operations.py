"""What attention processors compute with: heads, norms, masks, probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from tcaq_lightning.nn.layers import QuantLayer, base_layer


def shares_input_quantizer(layers: Sequence[nn.Module]) -> bool:
    """Whether all layers, adapters beside them or not, are quantized and read one quantized tensor."""
    bases = [base_layer(layer) for layer in layers]
    quantizers = {id(layer.input_quantizer) for layer in bases if isinstance(layer, QuantLayer)}
    return len(quantizers) == 1 and all(isinstance(layer, QuantLayer) for layer in bases)


def as_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H*W, C); sequences stay."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * d) as (B, heads, T, d)."""
    return torch.unflatten(x, -1, (heads, -1)).permute(0, 2, 1, 3)


def norm_heads(x: Tensor, norm: nn.Module | None, heads: int) -> Tensor:
    """A norm over each head's channels of (B, T, heads * d); None leaves them."""
    return x if norm is None else norm(torch.unflatten(x, -1, (heads, -1))).flatten(-2)


def rotate_heads(x: Tensor, rotary: Any, heads: int) -> Tensor:
    """Rotary position embeddings on (B, T, heads * d)."""
    rotated: Any = apply_rotary_emb(torch.unflatten(x, -1, (heads, -1)), rotary, sequence_dim=1)
    flat: Tensor = rotated.flatten(-2)
    return flat


def attention_probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask), (B * heads, T, S), for q (B * heads, T, d) and k (B * heads, S, d)."""
    added = q.new_empty(1, 1, 1) if mask is None else mask.to(q.dtype)  # beta 0: it is not looked at
    scores = torch.baddbmm(added, q, k.transpose(1, 2), beta=0 if mask is None else 1, alpha=scale)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))  # to be rounded: in float32


def prepared_by_head(mask: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """What diffusers' `prepare_attention_mask` returns, (B * heads, ..., S), as (B * heads, T or 1, S) to add.

    Args:
        mask: boolean (False is masked), or added to the scores.
        batch: B.
        heads: number of heads.
    """
    if mask is None:
        return None
    return _added(mask).reshape(batch * heads, -1, mask.shape[-1])


def _added(mask: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)


def mask_by_head(mask: Tensor | None, batch: int, heads: int, shape: tuple[int, int]) -> Tensor | None:
    """A mask as torch's fused attention takes it, broadcastable to (B, heads, T, S), as (B * heads, T, S) to add.

    Args:
        mask: boolean (False is masked), or added to the scores.
        batch: B.
        heads: number of heads.
        shape: (T, S).
    """
    if mask is None:
        return None
    return _added(mask).expand(batch, heads, *shape).flatten(0, 1)
