"""Quantized attention: processors that compute it in the open, and the registry that finds the one for an attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.quantizers import ActivationQuantizer, SoftmaxQuantizer
from tcaq_lightning.quantizers.activation import widened
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.quantizers.uniform import keeping_type

SELF = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


class QuantAttnProcessor(nn.Module):
    """Processor of a diffusers attention that computes it in the open, with every operand quantized.

    The fused attention call hides the probabilities, so none is used here. The projections are quantized layers of the
    attention itself; those that read one tensor share its quantizer, which then runs once. This one computes what
    `AttnProcessor2_0` does: plain self- and cross-attention; others derive from it and share its steps `project`,
    `attend` and `merge`.

    Attributes:
        query, key, value: quantizers of the operands of q k^T and P v. probabilities: DAQ's quantizer of P.
        normalizes: whether the attention's norms of q and k are applied.
        source: class name of the processor that it stands for.
    """

    normalizes = True
    source = "AttnProcessor2_0"

    def __init__(self, bits: int, softmax_bits: int, groups: TimestepGroups) -> None:
        super().__init__()
        self.query = ActivationQuantizer(bits, groups)
        self.key = ActivationQuantizer(bits, groups)
        self.value = ActivationQuantizer(bits, groups)
        self.probabilities = SoftmaxQuantizer(softmax_bits, groups)

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
            quantized = layers[0].input_quantizer(x)
            return [layer.compute(quantized) for layer in layers]
        return [layer(x) for layer in layers]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, scale: float | None = None
    ) -> Tensor:
        """softmax(scale q k^T + mask) v, its operands quantized.

        Args:
            q, k, v: (B, T, heads * d), (B, S, heads * d) and (B, S, heads * d).
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
        p = self.probabilities(torch.unflatten(p, 0, (batch, -1))).flatten(0, 1)  # (B * heads, T, S)
        out = torch.unflatten(torch.bmm(p, v), 0, (batch, -1))  # (B, heads, T, d)
        return out.permute(0, 2, 1, 3).reshape(batch, out.shape[2], -1)

    def merge(self, attn: Any, out: Tensor, residual: Tensor) -> Tensor:
        """Output projection, residual connection and rescaling, in the input's shape."""
        out = attn.to_out[1](attn.to_out[0](out))
        if residual.ndim == 4:
            out = out.transpose(1, 2).contiguous().view(residual.shape[0], -1, *residual.shape[2:])
        if attn.residual_connection:
            out = out + residual
        output: Tensor = out / attn.rescale_output_factor
        return output


class QuantAttnProcessorWithoutNorms(QuantAttnProcessor):
    """What `AttnProcessor` computes: it knows no norms of q and k."""

    normalizes = False


class QuantAddedKVAttnProcessor(QuantAttnProcessor):
    """What `AttnAddedKVProcessor2_0` computes: keys and values of the context beside those of the image."""

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


class QuantJointAttnProcessor(QuantAttnProcessor):
    """What `JointAttnProcessor2_0` computes (Stable Diffusion 3): image and context attend to both."""

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


class QuantFluxAttnProcessor(QuantJointAttnProcessor):
    """What `FluxAttnProcessor` computes: the context's tokens come first, and positions are rotations of q and k."""

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


PROCESSORS: dict[str, type[QuantAttnProcessor]] = {
    "AttnProcessor": QuantAttnProcessorWithoutNorms,
    "AttnProcessor2_0": QuantAttnProcessor,
    "FusedAttnProcessor2_0": QuantAttnProcessor,
    "AttnAddedKVProcessor": QuantAddedKVAttnProcessor,
    "AttnAddedKVProcessor2_0": QuantAddedKVAttnProcessor,
    "JointAttnProcessor2_0": QuantJointAttnProcessor,
    "FusedJointAttnProcessor2_0": QuantJointAttnProcessor,
    "FluxAttnProcessor": QuantFluxAttnProcessor,
}
"""By class name of a diffusers processor, the one that computes the same with quantized operands. Extend to add one."""

FUSED: dict[str, tuple[str, ...]] = {"to_qkv": SELF, "to_kv": SELF[1:], "to_added_qkv": ADDED}
"""Fused projections, and the ones that they stand for."""


def processor_name(attention: Any) -> str:
    """Class name of an attention's processor; that of the attention itself if it has none."""
    processor = getattr(attention, "processor", None)
    return type(attention if processor is None else processor).__name__


def separate_projections(attention: Any, name: str) -> dict[str, int]:
    """Undo diffusers' fusion of projections, in place, with the weights that the fused layers have now.

    q, k and v share their input's quantizer and have a scale for every output channel anyway: nothing is gained by one
    large layer, and a model that is opened again has separate ones.

    Args:
        attention: of a known processor. name: for the message.

    Returns:
        Number of parameters of each fused layer that was removed.

    Raises:
        UserError: the fused processor leaves out norms of q and k that the separate one would apply.
    """
    removed: dict[str, int] = {}
    kind = processor_name(attention)
    if kind == "FusedJointAttnProcessor2_0" and attention.norm_q is not None:
        raise UserError(
            f"attention {name} has norms of q and k, which its {kind} leaves out; expected separate projections: call "
            f"unfuse_qkv_projections() of the denoiser first"
        )
    used = kind.startswith("Fused") or (kind == "FluxAttnProcessor" and attention.fused_projections)
    for fused, parts in FUSED.items():
        layer = getattr(attention, fused, None)
        if layer is None:
            continue
        if used:
            _take_apart(layer, [attention.get_submodule(part) for part in parts])
        removed[f"{name}.{fused}"] = sum(p.numel() for p in layer.parameters())
        delattr(attention, fused)
    attention.fused_projections = False
    return removed


@torch.no_grad()
def _take_apart(fused: Any, parts: Sequence[Any]) -> None:
    """Give the parts parameters of their own: those that they have may be another denoiser's too."""
    sizes = [part.weight.shape[0] for part in parts]
    for kind in ("weight", "bias"):
        if getattr(fused, kind) is not None:
            for part, values in zip(parts, getattr(fused, kind).split(sizes), strict=True):
                requires_grad = getattr(part, kind).requires_grad
                setattr(part, kind, nn.Parameter(values.clone(), requires_grad=requires_grad))


def shares_input_quantizer(layers: Sequence[nn.Module]) -> bool:
    """Whether all layers are quantized and read one quantized tensor."""
    quantizers = {id(layer.input_quantizer) for layer in layers if isinstance(layer, QuantLayer)}
    return len(quantizers) == 1 and all(isinstance(layer, QuantLayer) for layer in layers)


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


def mask_by_head(mask: Tensor | None, batch: int, heads: int, shape: tuple[int, int]) -> Tensor | None:
    """A mask as torch's fused attention takes it, broadcastable to (B, heads, T, S), as (B * heads, T, S) to add.

    Args:
        mask: boolean (False is masked), or added to the scores.
        batch, heads: B and heads. shape: (T, S).
    """
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.expand(batch, heads, *shape).flatten(0, 1)
