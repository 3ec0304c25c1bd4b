from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from tcaq_lightning.config import LayerRule, QuantizationConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.families import is_attention
from tcaq_lightning.nn.attention import PROCESSORS, mask_by_head, processor_name
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


class Holder(nn.Module):
    """A denoiser of one attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Any, timestep: Any, **kwargs: Any) -> Any:
        return self.layer(sample, **kwargs)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def attention(**options: Any) -> Attention:
    torch.manual_seed(0)
    made = Attention(query_dim=8, heads=2, dim_head=4, **options)
    for p in made.parameters():  # norms are trivial at first
        p.data += 0.3 * torch.randn_like(p)
    return made.requires_grad_(False).eval()


def flux(joint: bool) -> FluxAttention:
    torch.manual_seed(0)
    options: dict[str, Any] = {"added_kv_proj_dim": 8} if joint else {"pre_only": True}
    made = FluxAttention(query_dim=8, heads=2, dim_head=4, bias=True, **options)
    for p in made.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return made.requires_grad_(False).eval()


def fused(made: Any, processor: Any = None) -> Any:
    made.fuse_projections()
    if processor is not None:
        made.set_processor(processor)
    return made.requires_grad_(False)


JOINT: dict[str, Any] = {"added_kv_proj_dim": 8, "bias": True, "context_pre_only": False}
ADDED: dict[str, Any] = {"added_kv_proj_dim": 6, "cross_attention_dim": 8, "norm_num_groups": 4, "bias": True}
TEXT, IMAGE = normal(3, 5, 6), normal(3, 8, 4, 4)
MASK = torch.zeros(3, 1, 5).index_fill_(2, torch.tensor([3, 4]), -1e4)
BOOLEAN = (normal(3, 2, 16, 5) > 0).index_fill_(3, torch.tensor([0]), True)  # another one for each sample
ROTARY = (normal(21, 4), normal(21, 4).flip(0))
ADDED_MASK = torch.zeros(3, 21).index_fill_(1, torch.tensor([1, 20]), -1e4)[:, None, None]

CASES: dict[str, tuple[Any, Tensor, dict[str, Any]]] = {
    "self": (attention(), normal(3, 16, 8), {}),
    "self, norms of q and k": (attention(qk_norm="layer_norm"), normal(3, 16, 8), {}),
    "self, RMS norms": (attention(qk_norm="rms_norm"), normal(3, 16, 8), {}),
    "AttnProcessor knows no norms": (attention(qk_norm="rms_norm", processor=AttnProcessor()), normal(3, 16, 8), {}),
    "another scale": (attention(scale_qk=False), normal(3, 16, 8), {}),
    "cross, masked": (
        attention(cross_attention_dim=6),
        normal(3, 16, 8),
        {"encoder_hidden_states": TEXT, "attention_mask": MASK},
    ),
    **{
        f"cross, boolean mask of {mask.ndim} axes": (
            attention(cross_attention_dim=6),
            normal(3, 16, 8),
            {"encoder_hidden_states": TEXT, "attention_mask": mask},
        )
        for mask in (BOOLEAN[:, 0, 0], BOOLEAN[:, 0, :1], BOOLEAN[:, :1])
    },
    "cross, additive mask of 4 axes": (
        attention(cross_attention_dim=6),
        normal(3, 16, 8),
        {"encoder_hidden_states": TEXT, "attention_mask": torch.where(BOOLEAN[:, :1], 0.5, -1e4)},
    ),
    "image": (attention(norm_num_groups=4, residual_connection=True, rescale_output_factor=1.5), IMAGE, {}),
    "fused": (fused(attention(bias=True), FusedAttnProcessor2_0()), normal(3, 16, 8), {}),
    "fused, cross, masked": (
        fused(attention(cross_attention_dim=6, qk_norm="layer_norm"), FusedAttnProcessor2_0()),
        normal(3, 16, 8),
        {"encoder_hidden_states": TEXT, "attention_mask": MASK},
    ),
    "added": (attention(**ADDED, processor=AttnAddedKVProcessor2_0()), IMAGE, {"encoder_hidden_states": TEXT}),
    "added, old": (
        attention(**ADDED, upcast_softmax=True, processor=AttnAddedKVProcessor()),
        IMAGE,
        {"encoder_hidden_states": TEXT},
    ),
    "added, norm of the context": (
        attention(
            **ADDED,
            cross_attention_norm="group_norm",
            cross_attention_norm_num_groups=2,
            processor=AttnAddedKVProcessor2_0(),
        ),
        IMAGE,
        {"encoder_hidden_states": TEXT},
    ),
    "added, only cross": (
        attention(**ADDED, only_cross_attention=True, processor=AttnAddedKVProcessor2_0()),
        IMAGE,
        {"encoder_hidden_states": TEXT},
    ),
    "joint": (
        attention(**JOINT, processor=JointAttnProcessor2_0()),
        normal(3, 16, 8),
        {"encoder_hidden_states": normal(3, 5, 8)},
    ),
    "joint, norms": (
        attention(**JOINT, qk_norm="rms_norm", processor=JointAttnProcessor2_0()),
        normal(3, 16, 8),
        {"encoder_hidden_states": normal(3, 5, 8)},
    ),
    "joint, last block": (
        attention(**(JOINT | {"context_pre_only": True}), processor=JointAttnProcessor2_0()),
        normal(3, 16, 8),
        {"encoder_hidden_states": normal(3, 5, 8)},
    ),
    "joint processor without a context": (attention(processor=JointAttnProcessor2_0()), normal(3, 16, 8), {}),
    "fused joint": (
        fused(attention(**JOINT), FusedJointAttnProcessor2_0()),
        normal(3, 16, 8),
        {"encoder_hidden_states": normal(3, 5, 8)},
    ),
    "Flux": (
        flux(joint=True),
        normal(3, 16, 8),
        {"encoder_hidden_states": normal(3, 5, 8), "image_rotary_emb": ROTARY},
    ),
    "Flux, masked": (
        flux(joint=True),
        normal(3, 16, 8),
        {"encoder_hidden_states": normal(3, 5, 8), "image_rotary_emb": ROTARY, "attention_mask": ADDED_MASK},
    ),
    "Flux, single": (flux(joint=False), normal(3, 21, 8), {"image_rotary_emb": ROTARY}),
    "Flux, fused": (
        fused(flux(joint=True)),
        normal(3, 16, 8),
        {"encoder_hidden_states": normal(3, 5, 8), "image_rotary_emb": ROTARY},
    ),
}


def quantized(layer: nn.Module, *rules: LayerRule) -> Holder:
    holder = Holder(layer).eval()
    quantize(holder, QuantizationConfig(rules=list(rules)), TimestepGroups([500.0]))
    return holder


def as_tensors(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, tuple) else [output]


@pytest.mark.parametrize("case", CASES)
def test_without_quantization_it_is_diffusers_own(case: str) -> None:
    layer, x, arguments = CASES[case]
    expected = as_tensors(layer(x, **arguments))
    kind = processor_name(layer)
    holder = quantized(copy.deepcopy(layer))
    assert type(holder.layer.processor) is PROCESSORS[kind]
    with full_precision(holder):
        got = as_tensors(holder(x, 0, **arguments))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).square().sum() / b.square().sum()) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_every_operand_is_quantized_once_and_layers_of_one_tensor_share(case: str) -> None:
    layer, x, arguments = CASES[case]
    holder = quantized(copy.deepcopy(layer))
    runs: dict[str, int] = {}
    seen: dict[str, Tensor] = {}
    for name, quantizer in quantizers(holder).items():
        quantizer.register_forward_hook(
            lambda _m, args, _o, n=name: (runs.__setitem__(n, runs.get(n, 0) + 1), seen.__setitem__(n, args[0]))[0]
        )
        quantizer.delta.fill_(0.02)
        if hasattr(quantizer, "zero_point"):
            quantizer.zero_point.fill_(128)
    for quant in quant_layers(holder).values():
        quant.learned_weight.search(quant.input_quantizer.r)
    before = as_tensors(holder(x, 0, **arguments))
    used = {id(q) for q in quantizers(holder).values()}
    assert set(runs.values()) == {1}
    assert len(runs) == len(used)  # none is left out
    assert len({t.data_ptr() for n, t in seen.items() if "processor" not in n}) == len(
        [n for n in seen if "processor" not in n]
    )  # a tensor that several layers read has one quantizer
    for name in ("query", "key", "value", "probabilities"):
        quantizer = getattr(holder.layer.processor, name)
        quantizer.delta.mul_(4)
        after = as_tensors(holder(x, 0, **arguments))
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), name
        quantizer.delta.div_(4)


def test_layers_with_other_bits_do_not_share() -> None:
    holder = quantized(
        attention(**JOINT, processor=JointAttnProcessor2_0()), LayerRule("*.add_k_proj", activation_bits=5)
    )
    added = [holder.layer.add_q_proj, holder.layer.add_k_proj, holder.layer.add_v_proj]
    assert len({id(layer.input_quantizer) for layer in added}) == 3
    x = normal(2, 3, 8)
    with added[0].input_quantizer.groups.using(torch.tensor([0])):
        got = holder.layer.processor.project(holder.layer, x, ("add_q_proj", "add_k_proj", "add_v_proj"))
        assert all(torch.equal(a, layer(x)) for a, layer in zip(got, added, strict=True))


@pytest.mark.parametrize("kept", [False, True])
def test_fused_projections_are_separate_whether_their_matmuls_are_kept_or_not(kept: bool) -> None:
    layer = fused(attention(bias=True), FusedAttnProcessor2_0())
    layer.to_qkv.weight *= 1.5
    layer.to_qkv.bias += 0.1
    x = normal(3, 16, 8)
    expected = layer(x)
    holder = quantized(layer, *([LayerRule("layer", keep=True)] if kept else []))
    assert not hasattr(layer, "to_qkv")
    assert isinstance(layer.processor, AttnProcessor2_0) == kept
    assert isinstance(layer.to_k, QuantLayer)
    with full_precision(holder):
        torch.testing.assert_close(holder(x, 0), expected, rtol=1e-5, atol=1e-5)


def test_leftovers_of_a_fusion_that_was_undone_are_dropped() -> None:
    layer = fused(attention())  # as after unfuse_qkv_projections(), which leaves the fused layers behind
    layer.to_qkv.weight.zero_()
    x = normal(3, 16, 8)
    expected = layer(x)
    holder = quantized(layer)
    with full_precision(holder):
        torch.testing.assert_close(holder(x, 0), expected, rtol=1e-5, atol=1e-5)


def test_a_fused_processor_that_leaves_out_norms_is_refused() -> None:
    layer = fused(attention(**JOINT, qk_norm="rms_norm"), FusedJointAttnProcessor2_0())
    with pytest.raises(UserError, match="attention layer has norms of q and k, which its FusedJointAttnProcessor2_0"):
        quantized(layer)


def test_masks_by_head_are_those_of_the_fused_call() -> None:
    q, k, v = (normal(2, 3, n, 4) for n in (5, 6, 6))
    boolean = normal(2, 1, 5, 6) > 0
    boolean[..., 0] = True
    for mask in (boolean, normal(2, 1, 1, 6), normal(5, 6)):
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        added = mask_by_head(mask, 2, 3, (5, 6))
        assert added is not None
        scores = q.flatten(0, 1) @ k.flatten(0, 1).mT / 2 + added
        torch.testing.assert_close((scores.softmax(-1) @ v.flatten(0, 1)).view(2, 3, 5, 4), expected)
    assert mask_by_head(None, 2, 3, (5, 6)) is None


def test_what_counts_as_an_attention() -> None:
    class WindowAttention(nn.Linear):
        pass

    class CrossAttentionBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = attention()

    class OuterAttention(CrossAttentionBlock):
        pass

    assert is_attention(attention())
    assert is_attention(flux(joint=True))
    assert is_attention(WindowAttention(2, 2))
    assert not is_attention(CrossAttentionBlock())
    assert not is_attention(OuterAttention())  # what is within is
