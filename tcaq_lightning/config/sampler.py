"""How images are sampled."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any

from tcaq_lightning.config.checks import require_count, require_plain, require_share, require_text
from tcaq_lightning.config.values import check_types


@dataclass
class SamplerConfig:
    """How images are sampled; any scheduler of diffusers will do."""

    scheduler: str | None = None
    """Class name in diffusers, such as DDIMScheduler or UniPCMultistepScheduler; null keeps the model's own."""
    num_steps: int = 20
    """Sampler steps S."""
    eta: float = 0.0
    """DDIM's noise share: 0 is deterministic, 1 is DDPM-like."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further settings of the scheduler, such as clip_sample or timestep_spacing."""
    place: InitVar[str] = field(default="sampler", kw_only=True)
    """Where it stands, for messages."""

    def __post_init__(self, place: str) -> None:
        self.check(place)

    def check(self, key: str) -> None:
        """Check that all values can be worked with, those too that were set after the sampler was made.

        Args:
            key: where it stands, such as `calibration.sampler`.

        Raises:
            UserError: a value is out of range; the message names its whole key.
        """
        check_types(self, key)
        require_count(self.num_steps, f"{key}.num_steps", most=10_000)
        require_text(self.scheduler, f"{key}.scheduler")
        require_plain(self.options, f"{key}.options")
        require_share(self.eta, f"{key}.eta")
