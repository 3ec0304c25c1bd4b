"""Whatever is given: success, or a `UserError` in one line, in bounded time."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import (
    Case,
    Subject,
    artifact_case,
    config_case,
    diffusers_case,
    manifest_case,
    model_case,
    outcome,
    prompts_case,
    statistics_case,
)

EXAMPLES = {
    config_case: 150,
    manifest_case: 40,
    prompts_case: 20,
    statistics_case: 40,
    model_case: 12,
    artifact_case: 12,
    diffusers_case: 12,
}
SECONDS = 30.0


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.__name__)
def test_no_fault_and_no_silent_change(case: Case, subject: Subject) -> None:
    @settings(max_examples=EXAMPLES[case], deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        began = time.perf_counter()
        found = outcome(case, str(seed), subject)
        assert not found.startswith("fault"), (seed, found)
        assert time.perf_counter() - began < SECONDS

    check()
