"""A metric of one's own: the mean contrast of the generated images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tcaq_lightning.config import EvaluationConfig
from tcaq_lightning.evaluation.metrics.base import METRICS, Given, Metric, Record, Row


class Contrast(nn.Module):
    """Standard deviation of the pixels of each image."""

    def forward(self, pixels: Tensor, start: int) -> Tensor:
        """uint8 (B, C, H, W) to (B,)."""
        return pixels.double().flatten(1).std(dim=1)


@METRICS.register("contrast")
class MeanContrast(Metric):
    """Mean contrast over all images."""

    label = "contrast"

    def per_image(self, config: EvaluationConfig) -> nn.Module:
        """What looks at each image; what it gives comes to `compute` under the metric's name."""
        return Contrast()

    def compute(self, given: Given) -> dict[str, Any]:
        """The figures, as metrics.json holds them."""
        contrast = given.features[self.name]  # (N,)
        return {"mean": float(contrast.mean()), "num_samples": len(contrast)}

    def row(self, record: Record) -> Row:
        """How the console, report.md, report.html and TensorBoard show them."""
        text = f"{record['mean']:.1f} of 255, {record['num_samples']} images"
        return Row(self.label, text, {self.name: record["mean"]})
