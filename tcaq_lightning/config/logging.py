"""What is written for people to look at."""

from __future__ import annotations

from dataclasses import dataclass

from tcaq_lightning.config.checks import Section, require_count


@dataclass
class LoggingConfig(Section):
    """What is written for people to look at."""

    tensorboard: bool = True
    """Write event files to RUN_DIR/tensorboard."""
    every_n_steps: int = 20
    """Optimisation steps between two logged losses."""
    grid_images: int = 16
    """Images in each full-precision-versus-quantized grid."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        require_count(self.every_n_steps, "logging.every_n_steps")
        require_count(self.grid_images, "logging.grid_images", most=4096)
