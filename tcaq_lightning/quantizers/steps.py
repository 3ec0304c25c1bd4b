"""Steps that are learned as relative changes of what a search found."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq_lightning.quantizers.base import Quantizer


class LearnedSteps(Quantizer):
    """A quantizer with steps that can be learned.

    Attributes:
        delta: (N,) steps.
        log_delta: relative changes that are being learned; None outside of a fit.
    """

    delta: Tensor

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.register_buffer("delta", delta)
        self.log_delta: nn.Parameter | None = None

    def begin_learning(
        self, reparameterize: bool = False, drop_probability: float = 0.0
    ) -> dict[str, list[nn.Parameter]]:
        """Make the steps learnable; returns the new parameters by kind. There is no r, and nothing is dropped."""
        self.log_delta = nn.Parameter(torch.zeros_like(self.delta))
        return {"steps": [self.log_delta]}

    @torch.no_grad()
    def end_learning(self) -> None:
        """Fold what was learned into `delta`."""
        delta = self.steps()
        self.log_delta = None
        self.delta.copy_(delta)

    def steps(self) -> Tensor:
        """(N,) current steps, differentiable in what is learned."""
        return self.delta if self.log_delta is None else self.delta * self.log_delta.exp()
