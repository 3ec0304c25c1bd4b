"""What the samples are of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tcaq_lightning.config.checks import Section, require, require_plain, require_text


@dataclass
class ConditioningConfig(Section):
    """What the samples are of; nothing of it concerns an unconditional model."""

    prompts: Path | None = None
    """Text file with one prompt a line; sample i takes line i, starting over after the last line."""
    negative_prompt: str | None = None
    """Negative prompt for all samples: what guidance leads away from."""
    class_labels: list[int] | None = None
    """Classes that the samples use in turn; null: all classes of a class-conditional model."""
    guidance_scale: float | None = None
    """Classifier-free guidance, in calibration, sampling and evaluation; null: the pipeline's own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline's call, such as height and width."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        self.prompts = None if self.prompts is None else Path(self.prompts)
        require(
            self.class_labels is None or len(self.class_labels) > 0,
            "conditioning.class_labels",
            "null or not empty",
            [],
        )
        require_text(self.prompts, "conditioning.prompts")
        require_plain(self.options, "conditioning.options")
        scale = self.guidance_scale
        require(scale is None or 0 <= scale < math.inf, "conditioning.guidance_scale", "finite and at least 0", scale)
        require(scale is None or scale <= 1e4, "conditioning.guidance_scale", "at most 1e4", scale)
