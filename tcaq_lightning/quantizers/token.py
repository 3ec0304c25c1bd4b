"""Dynamic quantizer of activations: a step and a zero point for every token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tcaq_lightning.quantizers.activation import ACTIVATION_QUANTIZERS, ActivationQuantizer, along
from tcaq_lightning.quantizers.base import StoredTensor
from tcaq_lightning.quantizers.uniform import affine_range, fake_quantize


@ACTIVATION_QUANTIZERS.register("token")
class TokenQuantizer(ActivationQuantizer):
    """Dynamic quantizer: step and zero point of every token come from its own values at run time.

    Asymmetric: the step of a token that covers [min, max] is never larger than that of one that covers
    [-max|x|, max|x|], and half as large behind a GELU. r and the shift by channel are as in the static one; `delta` and
    `zero_point` are not used.
    """

    kind: ClassVar[str] = "token"
    is_dynamic: ClassVar[bool] = True

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The shift, and r unless it is 1 everywhere."""
        return self.stored_channels()

    def search(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: steps are found at run time."""

    def begin_learning(
        self, reparameterize: bool = False, drop_probability: float = 0.0
    ) -> dict[str, list[nn.Parameter]]:
        """Make r learnable if asked; there are no steps to learn."""
        self.drop_probability = drop_probability
        return self.learned_scales() if reparameterize else {}

    def forward(self, x: Tensor) -> Tensor:
        """Shift and quantize (..., C) tokens, each with a step of its own."""
        x = self.centred(x)
        if not self.enabled:
            return x
        r = along(self.scales(), x.ndim, self.channel_dim)
        with torch.no_grad():  # as constants: the straight-through gradient is that of values within the range
            scaled = x / r
            low, high = scaled.amin(self.channel_dim, keepdim=True), scaled.amax(self.channel_dim, keepdim=True)
            step, zero = affine_range(low, high, self.bits)  # (..., 1)
        return self.dropped(x, fake_quantize(x, step * r, -zero, 2**self.bits - 1 - zero, narrow=True))
