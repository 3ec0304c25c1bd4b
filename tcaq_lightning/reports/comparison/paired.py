"""Two methods on the same samples: how sure one is better than the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Verdict = Literal["yes", "no", "not told apart"]
RESAMPLES = 4_000
"""Bootstrap samples of an interval."""
COVERED = 0.95
"""Share of the bootstrap samples within an interval."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """A mean error beside another one of the same samples.

    Attributes:
        ratio: of the means, the smaller the better.
        low: lower end of the ratio's 95 % interval.
        high: upper end.
    """

    ratio: float
    low: float
    high: float

    @property
    def better(self) -> Verdict:
        """Whether the error is smaller for certain, larger for certain, or neither.

        >>> Paired(0.8, 0.7, 0.9).better, Paired(1.0, 1.0, 1.0).better
        ('yes', 'not told apart')
        """
        return "yes" if self.high < 1 else "no" if self.low > 1 else "not told apart"


def mean_interval(errors: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of independent samples (Efron's percentile interval).

    Args:
        errors: one for each sample.
        seed: of resampling.
    """
    values = np.asarray(errors, dtype=np.float64)
    return _ends(_counts(len(values), seed) @ values / len(values))


def compare_paired(errors: Sequence[float], others: Sequence[float], seed: int = 0) -> Paired:
    """Ratio of two mean errors with its paired bootstrap interval: both means are of the same resampled samples.

    What makes one sample harder than another for every method cancels, so that far smaller differences show than by two
    intervals side by side.

    Args:
        errors: one for each sample.
        others: of the other method, on the same samples in the same order.
        seed: of resampling.

    Raises:
        ValueError: other numbers of samples.

    >>> compare_paired([1.0, 10.0, 100.0], [2.0, 20.0, 200.0])
    Paired(ratio=0.5, low=0.5, high=0.5)
    """
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (errors, others))
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"expected errors of the same samples, got {len(ours)} and {len(theirs)}")
    if np.array_equal(ours, theirs):
        return Paired(1.0, 1.0, 1.0)
    counts = _counts(len(ours), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num((counts @ ours) / (counts @ theirs), nan=1.0, posinf=np.inf)
        ratio = float(ours.mean() / theirs.mean())
    return Paired(ratio, *_ends(ratios))


def _counts(size: int, seed: int) -> Values:
    """(RESAMPLES, size): how often each bootstrap sample draws each of the samples."""
    return np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(np.float64)


def _ends(values: Values) -> tuple[float, float]:
    outside = (1 - COVERED) / 2
    low, high = np.quantile(values, [outside, 1 - outside], method="nearest")  # between two infinities lies nothing
    return float(low), float(high)
