"""Sensitivity weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tcaq_lightning.config.checks import Section, require, require_count, require_rate


@dataclass
class SensitivityConfig(Section):
    """Weights of units' errors by what they do to the final sample (docs/method.md, "Sensitivity weights").

    They are used where reconstruction.weighting is sensitivity.
    """

    data_variance: float = 4.0
    """Variance of the data along the smooth directions that a denoiser's errors have, in units of the noisy sample.
    With 4, the formula predicts to a factor of three how the shipped model's sampler carries single-step errors to its
    images."""
    probes: int = 4
    """Samples of each denoiser call that the squared Jacobians are estimated from."""

    def check(self) -> None:
        """Check that there is variance, and something to estimate from."""
        require(
            0 < self.data_variance < math.inf,
            "sensitivity.data_variance",
            "finite and positive",
            self.data_variance,
        )
        require_rate(self.data_variance, "sensitivity.data_variance")
        require_count(self.probes, "sensitivity.probes", most=10_000)
