"""TCR."""

from __future__ import annotations

from dataclasses import dataclass, field

from tcaq_lightning.config.checks import Section, require, require_factor, require_share


@dataclass
class TCRConfig(Section):
    """Timestep-channel joint reparameterization (docs/method.md, "TCR")."""

    enabled: bool = True
    """Off: r = 1 everywhere."""
    formula: str | list[str] = "searched"
    """searched: the candidate of least output error; profile: the published timestep-weighted formula alone;
    smoothquant: SmoothQuant's; or the name of another reparameterization. Given a list, the candidates are pooled."""
    exponents: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    """Exponents a of the searched candidates p^a and p^a / max|W|^(1 - a), where p is the profile of the channels'
    ranges."""
    alpha: float = 0.5
    """With smoothquant: how much of the difficulty moves to the weights, in [0, 1]."""
    truncation: float = 10.0
    """r lies in [1 / truncation, truncation]."""
    learn: bool = True
    """Learn log r in round 0's r phase, after the search."""
    share: float = 0.25
    """Share of round 0's iterations that the r phase takes."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        for i, exponent in enumerate(self.exponents):
            require(0 < exponent <= 1, f"tcr.exponents[{i}]", "above 0 and at most 1", exponent)
        require_share(self.alpha, "tcr.alpha")
        require_factor(self.truncation, "tcr.truncation")
        require(0 < self.share < 1, "tcr.share", "between 0 and 1", self.share)
