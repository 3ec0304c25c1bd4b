"""Quantized attention of the exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.backends.graph.layers import GraphLayer
from tcaq_lightning.backends.graph.operators import Constants
from tcaq_lightning.backends.graph.quantizers import GraphQuantizer, GraphSoftmaxQuantizer, graph_form
from tcaq_lightning.backends.graph.tables import Timesteps
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.attention import QuantAttnProcessor
from tcaq_lightning.runtime.registry import Registry


class GraphAttention(QuantAttnProcessor):
    """What the steps of quantized attention become in the graph: both matmuls on codes, uint8 times int8.

    Which steps there are, and in which order, is that of the quantized processor that a class derives from besides.

    (a - z_a)(b - z_b) = a b - z_a sum(b) - sum(a) z_b + K z_a z_b: the sums are over the axis that the product sums.
    """

    def __init__(self, source: QuantAttnProcessor, times: Timesteps, constants: Constants) -> None:
        nn.Module.__init__(self)
        self.spec, self.normalizes = source.spec, source.normalizes
        self.query = GraphQuantizer(source.query, times, constants)  # type: ignore[assignment]
        self.key = GraphQuantizer(source.key, times, constants, signed=True)  # type: ignore[assignment]
        self.value = GraphQuantizer(source.value, times, constants, signed=True)  # type: ignore[assignment]
        self.probabilities = GraphSoftmaxQuantizer(source.probabilities, times, constants)  # type: ignore[assignment]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, scale: float | None = None
    ) -> Tensor:
        """As in `QuantAttnProcessor`."""
        query, key, value, probabilities = self._quantizers()
        q, k, v = (self._by_heads(x, heads) for x in (q, k, v))  # (B, heads, T, C/heads)
        scale = int(q.shape[-1]) ** -0.5 if scale is None else scale
        scores = self._product(query, q, key, k.transpose(2, 3)) * (query.step(4) * key.step(4) * scale)
        if mask is not None:
            scores = scores + torch.unflatten(mask, 0, (-1, heads))
        p = probabilities(scores.softmax(dim=-1))  # (B, heads, T, S)
        if probabilities.integer:
            v = value(v)
            out = torch.matmul(p, v) - value.zero(4) * p.sum(dim=-1, keepdim=True)
            out = out * (probabilities.step() * value.step(4))
        else:
            out = torch.matmul(p, (value(v) - value.zero(4)) * value.step(4))
        heads, tokens, width = (int(size) for size in out.shape[1:])
        merged: Tensor = out.transpose(1, 2).reshape(-1, tokens, heads * width)
        return merged

    @staticmethod
    def _by_heads(x: Tensor, heads: int) -> Tensor:
        tokens, channels = (int(size) for size in x.shape[1:])
        return x.reshape(-1, tokens, heads, channels // heads).transpose(1, 2)

    @staticmethod
    def _product(first: GraphQuantizer, a: Tensor, second: GraphQuantizer, b: Tensor) -> Tensor:
        """Product of (B, heads, T, K) and (B, heads, K, S) in steps of both, zero points taken off."""
        a, b = first(a), second(b)
        zero_a, zero_b = first.zero(4), second.zero(4)
        product = torch.matmul(a, b) - zero_b * a.sum(dim=-1, keepdim=True)
        return product - zero_a * (b - zero_b).sum(dim=-2, keepdim=True)

    def project(self, attn: Any, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """As in `QuantAttnProcessor`."""
        layers: list[Any] = [getattr(attn, name) for name in names]
        if all(isinstance(layer, GraphLayer) and layer.inputs is layers[0].inputs for layer in layers):
            codes = layers[0].inputs(x)
            return [layer.compute(codes) for layer in layers]
        return [layer(x) for layer in layers]

    def _quantizers(self) -> tuple[GraphQuantizer, GraphQuantizer, GraphQuantizer, GraphSoftmaxQuantizer]:
        quantizers: Any = (self.query, self.key, self.value, self.probabilities)
        return quantizers  # type: ignore[no-any-return]


GRAPH_PROCESSORS: Registry[type[GraphAttention]] = Registry("attention processor of the exported graph")
"""By class name of a quantized processor that has steps of its own, what it becomes in the graph."""


def graph_attention(
    name: str, source: QuantAttnProcessor, times: Timesteps, constants: Constants
) -> QuantAttnProcessor:
    """What a quantized processor becomes in the graph: its own order of steps, with those of `GraphAttention`.

    Args:
        name: of the attention, for the message.
        source: the quantized processor.
        times: tables of the graph.
        constants: of the graph.

    Raises:
        UserError: the processor attends in a way of its own, and no graph form of it is registered.
    """
    kind = type(source)
    for operand in (source.query, source.key, source.value):
        if graph_form(name, operand) is not GraphQuantizer:
            raise UserError(f"unsupported quantizer {operand.kind} of {name}: expected uniform ones of q, k and v")
    if kind.__name__ in GRAPH_PROCESSORS:
        return GRAPH_PROCESSORS[kind.__name__](source, times, constants)
    if kind.attend is not QuantAttnProcessor.attend or kind.project is not QuantAttnProcessor.project:
        raise UserError(
            f"unsupported attention {name} ({kind.__name__}): it attends in a way of its own; expected a graph form of "
            f"it in GRAPH_PROCESSORS, or a rule that keeps it in full precision: "
            f"quantization.rules: [{{pattern: {name}, keep: true}}]"
        )
    formed: type[GraphAttention] = type(f"Graph{kind.__name__}", (GraphAttention, kind), {})
    return formed(source, times, constants)
