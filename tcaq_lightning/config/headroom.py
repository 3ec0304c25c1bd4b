"""Headroom of ranges."""

from __future__ import annotations

from dataclasses import dataclass

from tcaq_lightning.config.checks import Section, require, require_factor


@dataclass
class HeadroomConfig(Section):
    """How much wider the ranges of unnormalized inputs are than what calibration sees.

    Where a pixel lies outside of a tight range on the linear path from the noisy sample to the output, the denoiser
    does not see how much noise it has. It leaves the rest in the image, amplified (docs/method.md, "Quantizers").
    """

    enabled: bool = True
    """Off: all ranges are as tight as calibration finds them, as with all three factors at 1."""
    sample: float = 1.5
    """Factor for the steps of layers that read the noisy sample."""
    coarse_sample: float = 2.0
    """The same where activations have fewer than coarse_below bits: the quantized sampler drifts farther there."""
    coarse_below: int = 6
    """From this many activation bits on, `sample` applies; below, `coarse_sample` does."""
    stream: float = 1.35
    """Factor for the steps of layers that read the residual stream with no norm in between."""

    def check(self) -> None:
        """Check that every factor widens, or leaves the range as it is."""
        for name in ("sample", "coarse_sample", "stream"):
            require_factor(getattr(self, name), f"headroom.{name}")
        require(2 <= self.coarse_below <= 9, "headroom.coarse_below", "in 2..9", self.coarse_below)

    def of_sample(self, bits: int) -> float:
        """Factor for layers that read the noisy sample, by the activations' bits."""
        if not self.enabled:
            return 1.0
        return self.coarse_sample if bits < self.coarse_below else self.sample

    @property
    def of_stream(self) -> float:
        """Factor for layers that read the residual stream."""
        return self.stream if self.enabled else 1.0
