"""Where the loop is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Visit:
    """One unit's turn in one round.

    Attributes:
        round_index: of the round, from 0.
        position: of the unit in execution order, from 0.
        name: of the unit.
        start: the round whose result this one starts from; None in the first.

    >>> Visit(0, 3, "mid_block.resnets.0").tag
    'round0/03-mid_block.resnets.0'
    """

    round_index: int
    position: int
    name: str
    start: int | None = None

    @property
    def tag(self) -> str:
        """Names the visit in logs."""
        return f"round{self.round_index}/{self.position:02d}-{self.name}"
