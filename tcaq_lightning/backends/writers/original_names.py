"""Names of the original repositories, which ComfyUI and stable-diffusion.cpp know denoisers by.

diffusers takes their fused projections apart when it opens such files; here they are put together again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcaq_lightning.backends.writers.base import Checkpoint
from tcaq_lightning.errors import UserError
from tcaq_lightning.quantizers import CodedWeight

FUSED = "rows of projections of one tensor, which the file holds as one weight, differ in format or share no scales"


@dataclass(frozen=True)
class Original:
    """A module of the original repository.

    Attributes:
        parts: modules in diffusers whose rows follow each other in it.
        swapped: whether the two halves of the rows are exchanged: shift and scale of an adaptive norm.
        weight: what its weight is called.
    """

    parts: tuple[str, ...]
    swapped: bool = False
    weight: str = "weight"


QKV = "attn.to_q attn.to_k attn.to_v"
ADDED = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
EMBEDDERS = ("timestep_embedder", "guidance_embedder", "text_embedder")
FLUX = {
    **{
        f"{ours}.{a}_layer": f"time_text_embed.{theirs}.linear_{n}"
        for ours, theirs in zip(("time_in", "guidance_in", "vector_in"), EMBEDDERS, strict=True)
        for a, n in (("in", 1), ("out", 2))
    },
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
}
FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADDED,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
FLUX_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
FLUX_SINGLE = {"modulation.lin": "norm.linear", "linear1": f"{QKV} proj_mlp", "linear2": "proj_out"}
FLUX_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
SD3_BLOCK = {
    "x_block.attn.qkv": QKV,
    "context_block.attn.qkv": ADDED,
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn.proj": "attn.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn2.qkv": QKV.replace("attn.", "attn2."),
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
LAST_NORM = "final_layer.adaLN_modulation.1", Original(("norm_out.linear",), swapped=True)


def _placed(table: Mapping[str, str], ours: str, theirs: str, **options: Any) -> Iterator[tuple[str, Original]]:
    for original, parts in table.items():
        yield f"{ours}{original}", Original(tuple(f"{theirs}{part}" for part in parts.split()), **options)


def _flux(config: Any) -> dict[str, Original]:
    found = dict(_placed(FLUX, "", "")) | dict([LAST_NORM])
    for i in range(config.num_layers):
        found |= _placed(FLUX_DOUBLE, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        found |= _placed(FLUX_DOUBLE_NORMS, f"double_blocks.{i}.", f"transformer_blocks.{i}.", weight="scale")
    for i in range(config.num_single_layers):
        found |= _placed(FLUX_SINGLE, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
        found |= _placed(FLUX_SINGLE_NORMS, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", weight="scale")
    return found


def _sd3(config: Any) -> dict[str, Original]:
    found = dict(_placed(SD3, "", "")) | dict([LAST_NORM])
    for i in range(config.num_layers):
        found |= _placed(SD3_BLOCK, f"joint_blocks.{i}.", f"transformer_blocks.{i}.")
    last = f"joint_blocks.{config.num_layers - 1}.context_block.adaLN_modulation.1"
    return found | {last: Original(found[last].parts, swapped=True)}


NAMES = {"FluxTransformer2DModel": _flux, "SD3Transformer2DModel": _sd3}
"""By class of the denoiser, its modules' original names from its config."""
TENSORS = {"pos_embed.pos_embed": "pos_embed"}
"""Original names of tensors that are no module's weight or bias."""


def with_original_names(denoiser: Any, checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors under the names, and in the order of rows, of the original repository.

    Raises:
        UserError: nothing is known about the denoiser's class.
    """
    kind = type(denoiser).__name__
    if kind not in NAMES:
        raise UserError(f"--names original: expected a denoiser of {', '.join(NAMES)}, got {kind}; use diffusers")
    renamed = Checkpoint(plain={new: checkpoint.plain[old] for old, new in TENSORS.items() if old in checkpoint.plain})
    left = set(checkpoint.plain) - set(TENSORS)
    for name, original in NAMES[kind](denoiser.config).items():
        _rename(checkpoint, renamed, name, original)
        left -= {f"{part}.{leaf}" for part in original.parts for leaf in ("weight", "bias")}
    if left:
        raise UserError(f"--names original: nothing is known about {min(left)} of this {kind}; use diffusers")
    return renamed


def _rename(checkpoint: Checkpoint, renamed: Checkpoint, name: str, original: Original) -> None:
    """Put the tensors of some modules into another checkpoint as one of the name."""
    held = [checkpoint.held[part] for part in original.parts if part in checkpoint.held]
    joined = concatenated(held, original.swapped) if len(held) == len(original.parts) else None
    reasons = [checkpoint.kept[part] for part in original.parts if part in checkpoint.kept]
    if joined is not None:
        renamed.held[name] = joined
    elif held or reasons:
        renamed.kept[name] = [*reasons, FUSED][0]
    for leaf, new in (("weight", original.weight), ("bias", "bias")):
        if leaf == "weight" and joined is not None:
            continue
        rows = [_rows(checkpoint, f"{part}.{leaf}", part) for part in original.parts]
        there = [values for values in rows if values is not None]
        if len(there) == len(rows):
            renamed.plain[f"{name}.{new}"] = _swapped(there, original.swapped)


def _rows(checkpoint: Checkpoint, name: str, module: str) -> Tensor | None:
    if name.endswith(".weight") and module in checkpoint.held:
        weight = checkpoint.held[module]
        dequantized: Tensor = weight(torch.ones(1, device=weight.codes.device))
        return dequantized
    return checkpoint.plain.get(name)


def _swapped(rows: Sequence[Tensor], swapped: bool) -> Tensor:
    values = torch.cat(list(rows)) if len(rows) > 1 else rows[0]
    return torch.cat(values.chunk(2)[::-1]) if swapped else values


def concatenated(weights: Sequence[CodedWeight], swapped: bool = False) -> CodedWeight | None:
    """One weight with the rows of several, or None if one format with scales of its own rows cannot hold them.

    Args:
        weights: each (O, K).
        swapped: whether the two halves of the rows are exchanged.
    """
    first = weights[0].number_format
    if len(weights) == 1 and not swapped:
        return weights[0]
    for weight in weights:
        kind = weight.number_format
        alike = (kind.name, kind.bits, kind.symmetric, kind.granularity) == (
            first.name,
            first.bits,
            first.symmetric,
            first.granularity,
        )
        if not alike or (len(weights) > 1 and (kind.sharing.whole or weight.outer is not None)):
            return None

    def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        return _swapped(there, swapped and len(there[0]) > 1) if there else None

    codes, scale = _swapped([w.codes for w in weights], swapped), joined([w.scale for w in weights])
    assert scale is not None
    zero, offset = joined([w.zero_point for w in weights]), joined([w.offset for w in weights])
    return CodedWeight(codes, scale, zero, first, offset=offset, outer=weights[0].outer)
