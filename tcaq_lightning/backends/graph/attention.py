"""Quantized attention of the exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.backends.graph.layers import GraphLayer
from tcaq_lightning.backends.graph.operators import Constants
from tcaq_lightning.backends.graph.quantizers import GraphQuantizer, GraphSoftmaxQuantizer
from tcaq_lightning.backends.graph.tables import Timesteps
from tcaq_lightning.nn.attention import (
    QuantAddedKVAttnProcessor,
    QuantAttnProcessor,
    QuantAttnProcessorWithoutNorms,
    QuantFluxAttnProcessor,
    QuantJointAttnProcessor,
)


class GraphAttention(QuantAttnProcessor):
    """What the steps of quantized attention become in the graph: both matmuls on codes, uint8 times int8.

    Which steps there are, and in which order, is that of the quantized processor that a class derives from besides.

    (a - z_a)(b - z_b) = a b - z_a sum(b) - sum(a) z_b + K z_a z_b: the sums are over the axis that the product sums.
    """

    def __init__(self, source: QuantAttnProcessor, times: Timesteps, constants: Constants) -> None:
        nn.Module.__init__(self)
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


class GraphAttnProcessor(GraphAttention):
    """`QuantAttnProcessor` in the graph."""


class GraphAttnProcessorWithoutNorms(GraphAttention, QuantAttnProcessorWithoutNorms):
    """`QuantAttnProcessorWithoutNorms` in the graph."""


class GraphAddedKVAttnProcessor(GraphAttention, QuantAddedKVAttnProcessor):
    """`QuantAddedKVAttnProcessor` in the graph."""


class GraphJointAttnProcessor(GraphAttention, QuantJointAttnProcessor):
    """`QuantJointAttnProcessor` in the graph."""


class GraphFluxAttnProcessor(GraphAttention, QuantFluxAttnProcessor):
    """`QuantFluxAttnProcessor` in the graph."""


GRAPH_PROCESSORS: dict[type[QuantAttnProcessor], type[GraphAttention]] = {
    QuantAttnProcessor: GraphAttnProcessor,
    QuantAttnProcessorWithoutNorms: GraphAttnProcessorWithoutNorms,
    QuantAddedKVAttnProcessor: GraphAddedKVAttnProcessor,
    QuantJointAttnProcessor: GraphJointAttnProcessor,
    QuantFluxAttnProcessor: GraphFluxAttnProcessor,
}
"""Quantized processors and what they become in the graph. Extend to export another kind."""
