"""From features to the figures of every metric; the features of each image are computed once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tcaq_lightning.config import INCEPTION, EvaluationConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.json_values import finite
from tcaq_lightning.evaluation.metrics.base import FEATURES, METRICS, Given, Metric, Row, find_metric, plain_row
from tcaq_lightning.evaluation.reference import Reference

log = logging.getLogger(__name__)

POOLED = "pooled"


def check_metrics(config: EvaluationConfig) -> list[Metric]:
    """Check that the metrics are known and that their settings are given.

    Args:
        config: which metrics, and their settings.

    Returns:
        The metrics, in the order of `config.metrics`.

    Raises:
        UserError: an unknown metric, or a setting that is missing or that it cannot be measured with.
    """
    try:
        metrics = [find_metric(name) for name in config.metrics]
    except UserError as error:
        raise UserError(f"evaluation.metrics: {error}") from None
    for metric in metrics:
        beyond = set(metric.needs) - {POOLED}
        if beyond and config.features != INCEPTION:
            raise UserError(f"evaluation.features must be {INCEPTION} for {metric.name}, got {config.features!r}")
        for key in metric.settings:
            if not (value := getattr(config, key)):
                raise UserError(f"evaluation.{key} must be given for {metric.name}, got {value!r}")
    return metrics


def feature_names(metrics: Iterable[Metric]) -> tuple[str, ...]:
    """The extractor's features that metrics are computed from, in the order of `FEATURES`.

    >>> feature_names([find_metric("is"), find_metric("kid")])
    ('pooled', 'logits')
    """
    needed = {name for metric in metrics for name in metric.needs}
    return tuple(name for name in FEATURES if name in needed)


def score(
    name: str, features: Mapping[str, Tensor], reference: Reference, config: EvaluationConfig, seed: int
) -> dict[str, dict[str, Any]]:
    """All metrics of a set of images.

    Args:
        name: of the images, for messages.
        features: by name (N, ...), as `FeatureSpace` gives them.
        reference: real images, with all that the metrics need.
        config: which metrics, and their settings.
        seed: of everything random in them.

    Returns:
        JSON-ready figures by metric, None for one that is not finite; empty if features are not finite.
    """
    metrics = [find_metric(metric) for metric in config.metrics]
    if not all(values.isfinite().all() for values in features.values()):
        titles = ", ".join(metric.title for metric in metrics)
        log.warning("no %s of the %s: some of its images are NaN, its sampling diverged", titles, name)
        return {}
    given = Given(features, reference, config, seed)
    return {metric.name: finite(metric.compute(given)) for metric in metrics}


def row_of(name: str, record: Mapping[str, Any]) -> Row:
    """How a metric is shown; one that is not registered here shows its figures as they are.

    Args:
        name: of the metric.
        record: its figures, from metrics.json.

    Raises:
        ValueError: the figures are not those of the metric.
    """
    try:
        return find_metric(name).row(record) if name in METRICS else plain_row(name, name, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"expected the figures of {name}, got {record!r}") from error
