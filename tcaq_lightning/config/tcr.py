"""TCR."""

from __future__ import annotations

from dataclasses import dataclass

from tcaq_lightning.config.checks import Section, require, require_factor


@dataclass
class TCRConfig(Section):
    """Timestep-channel joint reparameterization (docs/method.md, "TCR")."""

    enabled: bool = True
    """Off: r = 1 everywhere."""
    formula: str | list[str] = "searched"
    """searched: the candidate of least output error; profile: the published timestep-weighted formula alone;
    smoothquant: SmoothQuant's; or the name of another reparameterization. Of a list the candidates are pooled."""
    truncation: float = 10.0
    """r lies in [1 / truncation, truncation]."""
    learn: bool = True
    """Learn log r in round 0's r phase, after the search."""
    share: float = 0.25
    """Share of round 0's iterations that the r phase takes."""

    def check(self) -> None:
        """See that all values can be worked with."""
        require_factor(self.truncation, "tcr.truncation")
        require(0 < self.share < 1, "tcr.share", "between 0 and 1", self.share)
