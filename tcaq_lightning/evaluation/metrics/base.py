"""What a metric is: what it needs, how it is computed, and how it is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from tcaq_lightning.config import EvaluationConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.reference import PARTS, Reference
from tcaq_lightning.runtime.registry import Registry

FEATURES = ("pooled", "spatial", "logits")
"""What an extractor gives of an image: (F,) features, (F',) features that keep positions, and class logits. Inception
gives all three, an extractor of one's own `pooled` alone."""

Record = Mapping[str, Any]
"""JSON-ready figures by name; None for one that is not finite."""


@dataclass(frozen=True)
class Given:
    """What a metric is computed from.

    Attributes:
        features: by name, the N generated images' `FEATURES` that are needed, (N, ...), and under the name of each
            metric that has one what its `per_image` gave, (N, ...). All are finite, and on the CPU.
        reference: real images, with the parts that are needed.
        config: settings of the evaluation.
        seed: of everything random.
    """

    features: Mapping[str, Tensor]
    reference: Reference
    config: EvaluationConfig
    seed: int


@dataclass(frozen=True)
class Row:
    """How a metric is shown.

    Attributes:
        label: name for readers.
        text: the figures, for the console's table, report.md and report.html.
        values: the figures that TensorBoard keeps, by name.
    """

    label: str
    text: str
    values: Mapping[str, float | None] = field(default_factory=dict)


class Metric(ABC):
    """A figure of merit of a set of images. A subclass registers itself: `@METRICS.register("fid")`.

    Args:
        name: under which it is registered.
    """

    label: ClassVar[str] = ""
    """Name for readers; by default the registered name."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Which `FEATURES` of the generated images it looks at."""
    reference_needs: ClassVar[tuple[str, ...]] = ()
    """Which parts of a `Reference` it compares with: `statistics`, `spatial`, `features`."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Keys of `evaluation` that must be given for it; they are recorded beside the figures."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def compute(self, given: Given) -> dict[str, Any]:
        """The figures, JSON-ready.

        Args:
            given: what it `needs`, and the settings.
        """

    def row(self, record: Record) -> Row:
        """How the figures are shown.

        Args:
            record: what `compute` gave, from metrics.json; None for a figure that is not finite.
        """
        return plain_row(self.name, self.title, record)

    def per_image(self, config: EvaluationConfig) -> nn.Module | None:
        """What looks at each image by itself, such as a network of the metric's own; None if the features are enough.

        It is called with pixels, uint8 (B, 1 or 3, H, W), and the number of the first image, and gives floats (B, ...).
        Those of all images are then in `Given.features` under the metric's name. A setting that changes what it gives
        must be an attribute of it: finished batches are kept under its attributes and weights.

        Args:
            config: settings of the evaluation.

        Raises:
            UserError: it cannot be opened.
        """
        return None

    def least_images(self, config: EvaluationConfig) -> tuple[int, str]:
        """How many images it takes at least, generated ones and, where it compares with their features, real ones.

        Args:
            config: settings of the evaluation.

        Returns:
            The number, and the key that it comes from, for messages.
        """
        return 1, "evaluation.metrics"

    def check_number(self, number: int, what: str, config: EvaluationConfig, width: int) -> None:
        """Check that there are enough images, here by `least_images`.

        Args:
            number: of the images.
            what: they are, for the message.
            config: settings of the evaluation.
            width: number F of pooled features; 0 without an extractor.

        Raises:
            UserError: there are too few.
        """
        least, key = self.least_images(config)
        if number < least:
            raise UserError(f"{what} must be at least {least} for {self.name} ({key}), got {number}")

    @property
    def title(self) -> str:
        """The label, or the name without one."""
        return self.label or self.name


def plain_row(name: str, label: str, record: Record) -> Row:
    """A row that shows the figures under their own names.

    Args:
        name: of the metric, for TensorBoard.
        label: its name for readers.
        record: its figures; what is no number is left out.

    >>> plain_row("contrast", "contrast", {"mean": 0.25}).text
    'mean 0.2500'
    """
    values = {key: value for key, value in record.items() if value is None or isinstance(value, (int, float))}
    text = ", ".join(f"{key} {decimals(value, 4)}" for key, value in values.items())
    return Row(label, text, {f"{name}_{key}": value for key, value in values.items()})


METRICS: Registry[type[Metric]] = Registry("metric")
"""Metrics by the name that `evaluation.metrics` calls them by."""


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        UserError: there is none.
    """
    metric = METRICS[name](name)
    for given, known, key in (
        (metric.needs, FEATURES, "needs"),
        (metric.reference_needs, PARTS, "reference_needs"),
    ):
        if unknown := set(given) - set(known):
            raise UserError(
                f"metric {name}: {key} must be some of {', '.join(known)}, got {', '.join(sorted(unknown))}; "
                f"correct {METRICS[name].__module__}"
            )
    return metric


def decimals(value: float | None, digits: int) -> str:
    """A figure with so many decimals; a dash for one that is not finite.

    >>> decimals(1.25, 3), decimals(None, 3)
    ('1.250', '-')
    """
    return "-" if value is None else f"{value:.{digits}f}"
