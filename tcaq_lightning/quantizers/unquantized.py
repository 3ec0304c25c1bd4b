"""Inputs that stay in floating point: weight-only quantization."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from tcaq_lightning.quantizers.activation import ACTIVATION_QUANTIZERS, ActivationQuantizer
from tcaq_lightning.quantizers.base import StoredTensor


@ACTIVATION_QUANTIZERS.register("float")
class FloatQuantizer(ActivationQuantizer):
    """Returns its input as it is, whatever r: what r does to the weight's grid remains, as in AWQ (Lin et al. 2024)."""

    kind: ClassVar[str] = "float"
    is_dynamic: ClassVar[bool] = True

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """r, unless it is 1 everywhere."""
        return self.stored_channels()

    def search(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: there are no steps."""

    def begin_learning(
        self, reparameterize: bool = False, drop_probability: float = 0.0
    ) -> dict[str, list[nn.Parameter]]:
        """Make r learnable if asked; there are no steps to learn, and nothing to drop."""
        return self.learned_scales() if reparameterize else {}

    def forward(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x
