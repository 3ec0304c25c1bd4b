from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcaq_lightning.reports.comparison.paired import compare_paired, mean_interval


def test_interval_against_a_loop() -> None:
    errors = np.random.default_rng(1).lognormal(size=40)
    generator = np.random.default_rng(2)
    means = sorted(float(generator.choice(errors, len(errors)).mean()) for _ in range(4000))
    low, high = mean_interval(errors.tolist())
    assert low == pytest.approx(means[100], rel=0.03)
    assert high == pytest.approx(means[3899], rel=0.03)


def test_coverage_of_the_mean() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = mean_interval(generator.normal(3.0, 1.0, 60).tolist())
        inside += low < 3.0 < high
    assert 180 <= inside <= 198  # 190 expected


def test_pairing_shows_what_two_intervals_hide() -> None:
    generator = np.random.default_rng(3)
    hard = generator.lognormal(sigma=2.0, size=50)
    ours, theirs = (0.9 * hard).tolist(), (hard * generator.normal(1.0, 0.02, 50)).tolist()
    assert mean_interval(ours)[1] > mean_interval(theirs)[0]
    assert compare_paired(ours, theirs).better == "yes"
    assert compare_paired(theirs, ours).better == "no"


def test_noise_is_not_told_apart() -> None:
    generator = np.random.default_rng(4)
    ours, theirs = generator.lognormal(size=(2, 30)).tolist()
    assert compare_paired(ours, theirs).better == "not told apart"


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20), st.floats(0.01, 100))
def test_ratio_of_a_multiple_is_known_exactly(errors: list[float], factor: float) -> None:
    found = compare_paired([factor * e for e in errors], errors)
    for value in (found.ratio, found.low, found.high):
        assert value == pytest.approx(factor)


def test_equal_errors() -> None:
    found = compare_paired([0.0, 0.0], [0.0, 0.0])
    assert (found.ratio, found.better) == (1.0, "not told apart")


def test_an_error_beside_none_is_worse() -> None:
    assert compare_paired([1.0, 2.0], [0.0, 0.0]).better == "no"


def test_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="same samples, got 2 and 3"):
        compare_paired([1.0, 2.0], [1.0, 2.0, 3.0])
