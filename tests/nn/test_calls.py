"""Attention in processors that are not rewritten: the calls within are quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SanaLinearAttnProcessor2_0
from diffusers.models.embeddings import HunyuanDiTAttentionPool
from torch import Tensor, nn

from tcaq_lightning.config import LayerRule, QuantizationConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.attention import keep_quantized, quantized_processor
from tcaq_lightning.nn.attention.calls import LinearCalls, OpenCalls, QuantCalls, interception
from tcaq_lightning.nn.parts import quantizers
from tcaq_lightning.nn.prepare import foresee_calls, quantize
from tcaq_lightning.nn.spec import AttentionSpec
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class OwnAttention(nn.Module):
    """An attention of no class that is known, computed by a function of torch's."""

    def __init__(self, compute: Callable[..., Tensor] = F.scaled_dot_product_attention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.compute = nn.Linear(8, 24), compute

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        if self.compute is F.scaled_dot_product_attention:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.compute(q, k, v).transpose(1, 2).flatten(2)


def in_the_open(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / 2, dim=-1)
    return torch.matmul(p, v)


class OpenAttention(OwnAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return in_the_open(q, k, v).transpose(1, 2).flatten(2)


class TwiceAttention(OwnAttention):
    """Attends twice, and the second time sample by sample."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        first = F.scaled_dot_product_attention(q, k, v)
        single = [F.scaled_dot_product_attention(*(y[i : i + 1] for y in (q, k, first))) for i in range(len(q))]
        return torch.cat(single).transpose(1, 2).flatten(2)


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Any, timestep: Any, **kwargs: Any) -> Any:
        return self.layer(sample, **kwargs)


def quantized(layer: nn.Module, *rules: LayerRule) -> tuple[Holder, list[Any]]:
    holder = Holder(layer).requires_grad_(False).eval()
    return holder, quantize(holder, QuantizationConfig(rules=list(rules)), TimestepGroups([500.0]))


def observed(module: nn.Module) -> dict[str, list[Tensor]]:
    """What every quantizer is given from now on."""
    seen: dict[str, list[Tensor]] = {}
    for name, quantizer in quantizers(module).items():
        quantizer.register_forward_pre_hook(lambda _m, args, n=name: seen.setdefault(n, []).append(args[0]))
    return seen


BOOLEAN = torch.rand(3, 2, 5, 6, generator=torch.Generator().manual_seed(0)) > 0.4
MASKS: dict[str, Tensor] = {
    "two axes": BOOLEAN[0, 0],
    "three axes": BOOLEAN[0],
    "four axes": BOOLEAN,
    "one for each sample": BOOLEAN[:, :1, :1],
    "some see nothing": BOOLEAN.index_fill(2, torch.tensor([1]), False),
}


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_those_of_torchs_own_call(name: str, added: bool) -> None:
    mask = MASKS[name]
    if added:
        mask = torch.where(mask, normal(*mask.shape), -1e4)
    operands = QuantCalls(AttentionSpec(), TimestepGroups([]))
    for quantizer in operands.quantizers():
        quantizer.enabled = False
    q, k, v = normal(3, 2, 5, 4), normal(3, 2, 6, 4), normal(3, 2, 6, 3)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(operands.attention(q, k, v, attn_mask=mask), expected)


def test_causal_scaled_and_shared_heads_are_those_of_torchs_own_call() -> None:
    operands = QuantCalls(AttentionSpec(), TimestepGroups([]))
    for quantizer in operands.quantizers():
        quantizer.enabled = False
    q, k, v = normal(3, 4, 5, 4), normal(3, 2, 6, 4), normal(3, 2, 6, 4)
    options: dict[str, Any]
    for options in ({"scale": 0.3}, {"is_causal": True}):
        expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        torch.testing.assert_close(operands.attention(q, k, v, enable_gqa=True, **options), expected)


@pytest.mark.parametrize("kind", [OwnAttention, OpenAttention, TwiceAttention])
def test_off_it_is_the_original_bit_for_bit_and_observed_nearly(kind: type[OwnAttention]) -> None:
    x = normal(3, 5, 8)
    expected = kind()(x)
    holder, _ = quantized(kind())
    with full_precision(holder):
        assert torch.equal(holder(x, torch.tensor([0, 900, 0])), expected)
        seen = observed(holder)
        torch.testing.assert_close(holder(x, torch.tensor([0, 900, 0])), expected)
    assert {name.rpartition(".")[2] for name in seen} == {
        "input_quantizer",
        "query",
        "key",
        "value",
        "probabilities",
    }


@pytest.mark.parametrize("kind", [OwnAttention, OpenAttention, TwiceAttention])
def test_every_operand_is_quantized(kind: type[OwnAttention]) -> None:
    holder, rows = quantized(kind())
    assert {row.bits for row in rows if row.kind == "matmul"} == {"A8 A8", "P8 A8"}
    x, t = normal(3, 5, 8), torch.tensor([0, 900, 0])
    with full_precision(holder):
        holder(x, t)
    for quantizer in quantizers(holder).values():
        quantizer.delta.fill_(0.02)
        if hasattr(quantizer, "zero_point"):
            quantizer.zero_point.fill_(128)
    before = holder(x, t)
    for name, quantizer in quantizers(holder).items():
        quantizer.delta.mul_(4)
        assert not torch.equal(holder(x, t), before), name
        quantizer.delta.div_(4)


def test_every_call_has_quantizers_of_its_own_and_samples_are_told_apart() -> None:
    holder, _ = quantized(TwiceAttention())
    x, t = normal(3, 5, 8), torch.tensor([0, 900, 0])
    with full_precision(holder):
        holder(x, t)
    operands = quantized_processor(holder.layer)
    assert isinstance(operands, QuantCalls)
    assert operands.describe().calls == 2
    operands.further[0].value.delta.copy_(torch.tensor([0.02, 0.5]))  # groups of timesteps 0 and 900
    operands.further[0].value.zero_point.fill_(128)
    before = holder(x, t)
    operands.further[0].value.delta[1] = 0.01
    assert [torch.equal(a, b) for a, b in zip(holder(x, t), before, strict=True)] == [True, False, True]


def test_calls_are_foreseen_and_listed() -> None:
    holder, rows = quantized(TwiceAttention())
    x, t = normal(3, 5, 8), torch.tensor([0, 900, 0])
    names = [row.name for row in foresee_calls(holder, lambda: holder(x, t), rows) if row.kind == "matmul"]
    assert names == [
        "layer (q k^T)",
        "layer (P v)",
        "layer, call 2 (q k^T)",
        "layer, call 2 (P v)",
    ]
    assert all(quantizer.enabled for quantizer in quantizers(holder).values())
    assert len(quantizers(holder)) == 9  # a layer's input and four operands of each call


def test_a_finished_attention_refuses_calls_that_were_not_calibrated() -> None:
    operands = QuantCalls(AttentionSpec(calls=2), TimestepGroups([]))
    operands.fixed = True
    assert operands.of_call(1) is operands.further[0]
    with pytest.raises(UserError, match="computed 3 times in one forward pass, expected at most 2"):
        operands.of_call(2)


def test_rows_of_a_sample_are_quantized_by_its_timestep() -> None:
    holder, _ = quantized(OwnAttention())
    operands = quantized_processor(holder.layer)
    assert operands is not None
    x, t = normal(2, 5, 8).repeat_interleave(3, 0), torch.tensor([0, 900])

    class Folding(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            y: Tensor = holder.layer(sample.repeat_interleave(3, 0))
            return y

    for quantizer in (operands.query, operands.key, operands.value):
        quantizer.delta.copy_(torch.tensor([0.02, 0.3]))
        quantizer.zero_point.fill_(128)
    operands.probabilities.delta.copy_(torch.tensor([0.004, 0.1]))
    groups = operands.query.groups
    with groups.using(groups.of(t)):
        folded = holder.layer(x)
    for sample, timestep in enumerate(t):
        with groups.using(groups.of(timestep[None])):
            rows = slice(3 * sample, 3 * sample + 3)
            torch.testing.assert_close(folded[rows], holder.layer(x[rows]))


def test_linear_attention_has_quantized_products() -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=8, heads=2, dim_head=4, processor=SanaLinearAttnProcessor2_0())
    x = normal(3, 5, 8)
    expected = layer(x)
    assert interception(layer) is LinearCalls
    holder, _ = quantized(layer)
    with full_precision(holder):
        torch.testing.assert_close(holder(x, 0), expected)
        seen = observed(holder)
        holder(x, 0)
    assert {"layer.operands.query", "layer.operands.key", "layer.operands.probabilities", "layer.operands.value"} <= {
        *seen
    }


def test_an_attention_that_reads_its_layers_weights_runs_them_instead() -> None:
    torch.manual_seed(0)
    layer = HunyuanDiTAttentionPool(4, 8, 2, 6)
    x = normal(3, 4, 8)
    expected = layer(x)
    holder, rows = quantized(layer)
    with full_precision(holder):
        torch.testing.assert_close(holder(x, 0), expected)
    assert {row.name for row in rows if row.kind == "Linear" and row.bits != "float"} >= {
        "layer.q_proj",
        "layer.c_proj",
    }
    seen = observed(holder)
    holder(x, 0)
    assert len(seen) == 8  # four layers and four operands


def test_an_artifacts_attention_takes_its_own_processor_again_and_no_other() -> None:
    torch.manual_seed(0)
    layer: Any = Attention(query_dim=8, heads=2, dim_head=4, processor=SanaLinearAttnProcessor2_0())
    holder, _ = quantized(layer)
    keep_quantized(holder)
    layer.set_processor(SanaLinearAttnProcessor2_0())
    with pytest.raises(UserError):
        layer.set_processor(AttnProcessor2_0())
    assert isinstance(quantized_processor(layer), QuantCalls)


def test_which_attentions_are_known() -> None:
    class NoAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert interception(OpenAttention()) is OpenCalls
    assert interception(NoAttention()) is None
