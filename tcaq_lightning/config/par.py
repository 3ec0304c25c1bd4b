"""PAR."""

from __future__ import annotations

from dataclasses import dataclass

from tcaq_lightning.config.checks import Section, require


@dataclass
class PARConfig(Section):
    """Progressively aligned reconstruction (docs/method.md, "PAR")."""

    enabled: bool = True
    """Off: round 0 only, with all iterations."""
    rounds: int = 1
    """Rounds M after round 0."""
    final_share: float = 1.0
    """Share rho_M of the last round's trajectories that the quantized sampler draws; round m takes m / M of it."""
    share: float = 0.3
    """Share of all iterations that the later rounds take together."""
    trajectories: float = 0.5
    """Share of the calibration trajectories that a later round learns from; they are drawn again for each round."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        require(self.rounds >= 1, "par.rounds", "at least 1 (par.enabled switches them off)", self.rounds)
        require(self.rounds <= 1000, "par.rounds", "at most 1000", self.rounds)
        require(0 < self.share < 1, "par.share", "between 0 and 1", self.share)
        require(0 < self.final_share <= 1, "par.final_share", "in (0, 1]", self.final_share)
        require(0 < self.trajectories <= 1, "par.trajectories", "in (0, 1]", self.trajectories)
