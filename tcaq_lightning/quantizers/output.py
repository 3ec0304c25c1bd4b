"""Quantizer of a layer's output, for engines whose integer convolutions give integers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tcaq_lightning.quantizers.activation import along
from tcaq_lightning.quantizers.base import Place, StoredTensor
from tcaq_lightning.quantizers.range_search import NORM, search_affine
from tcaq_lightning.quantizers.steps import LearnedSteps
from tcaq_lightning.quantizers.uniform import fake_quantize

OUTPUT_BITS = 8
"""Code width of outputs: what integer kernels write."""
LOWEST = -(2 ** (OUTPUT_BITS - 1))
"""Smallest code."""
VALUES = 4096
"""Values per channel that a range search looks at."""


class OutputQuantizer(LearnedSteps):
    """Uniform quantizer of y = W^ x^, before the bias, by output channel and, without a table, by timestep group.

    The input's step s_g is a common factor of y = s_g t, t = scale_o a with an integer a that the engine sums up. What
    is quantized is t, with constants for all timesteps, so that the steps of y follow those of the input:

        e = clip(round((t + scale_o n_o) / delta_o), -128, 127),  y^ = s_g (delta_o e - scale_o n_o)

    An engine has one step and one zero point for the whole tensor, yet a scale of the weight and an integer bias for
    each channel: scale_o / delta_o and n_o are these, at no cost, and the step becomes 1.

    Attributes:
        delta: (O,) steps of t.
        offset: (O,) integer-valued n.
        log_delta: relative change that is being learned; None outside of a fit.
        enabled: off while the layer computes in full precision.
    """

    kind: ClassVar[str] = "output"
    place: ClassVar[Place] = "output"
    bits = OUTPUT_BITS
    delta: Tensor
    offset: Tensor

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__(torch.ones(channels))
        self.channel_dim = channel_dim
        self.enabled = True
        self.register_buffer("offset", torch.zeros(channels))

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Steps and offsets."""
        return StoredTensor.plain("delta", self.delta), StoredTensor.plain("offset", self.offset)

    @torch.no_grad()
    def search(self, values: Tensor, scale: Tensor, headroom: float = 1.0, norm: float = NORM) -> None:
        """Search step and offset of every channel.

        Args:
            values: outputs in units of the input's step, t, with the channels on `channel_dim`.
            scale: (O,) of the weight's codes.
            headroom: factor on the ranges.
            norm: p of the error.
        """
        rows = values.movedim(self.channel_dim, 0).flatten(1)  # (O, N)
        low, high = rows.amin(1), rows.amax(1)
        if rows.shape[1] > VALUES:
            generator = torch.Generator().manual_seed(rows.shape[1])
            rows = rows[:, torch.randint(rows.shape[1], (VALUES,), generator=generator).to(rows.device)]
        middle = (low + high) / 2
        limits = low - middle, high - middle
        delta, zero = search_affine(rows - middle[:, None], OUTPUT_BITS, limits=limits, norm=norm)
        delta = torch.maximum(delta * headroom, scale)  # sums of codes lie no closer to each other
        self.delta.copy_(delta)
        self.offset.copy_((((zero + LOWEST) * delta - middle) / scale).round())

    @torch.no_grad()
    def rescale(self, before: Tensor, after: Tensor) -> None:
        """Keep what the offset is in units of t, where the scale of the weight's codes, (O,), has changed."""
        self.offset.copy_((self.offset * before / after).round())

    def forward(self, y: Tensor, input_step: Tensor, scale: Tensor) -> Tensor:
        """Quantize outputs without bias.

        Args:
            y: (B, O, H, W) or (B, ..., O).
            input_step: s_g of each sample, (B, 1, ..., 1) of y's axes.
            scale: (O,) of the weight's codes.
        """
        if not self.enabled:
            return y
        step = input_step * along(self.steps(), y.ndim, self.channel_dim)
        shift = input_step * along(scale * self.offset, y.ndim, self.channel_dim)
        quantized = fake_quantize(y + shift, step, y.new_full((), LOWEST), y.new_full((), -1 - LOWEST))
        return quantized - shift
