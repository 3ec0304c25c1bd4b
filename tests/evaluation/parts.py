"""What metrics compare with, as `open_reference` wants it."""

from __future__ import annotations

from tcaq_lightning.evaluation.metrics.base import METRICS


def parts(*metrics: str) -> dict[str, tuple[str, ...]]:
    return {name: METRICS[name].reference_needs for name in metrics}
