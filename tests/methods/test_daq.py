from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from tcaq_lightning.calibration.probes import capture_inputs, probe_indices
from tcaq_lightning.config import DAQConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.methods.daq import RULES, Evidence, decide_by_likelihood
from tcaq_lightning.methods.daq_tails import fit_tail
from tcaq_lightning.nn.parts import quantizers
from tcaq_lightning.quantizers import SoftmaxQuantizer
from tcaq_lightning.quantizers.observers import LogHistogram

CPU = torch.device("cpu")
ATTENTION = "mid_block.attentions.0"
SOFTMAX = "processor.probabilities"


def mixed_histogram(groups: int = 20, size: int = 20_000) -> LogHistogram:
    """Even groups hold a power law of exponent 1.5 on [1e-3, 1], odd ones an exponential of rate 50."""
    u = torch.rand(groups, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    power_law = (1e-3**-0.5 + u * (1 - 1e-3**-0.5)) ** -2
    exponential = (-torch.log1p(-u) / 50).clamp(max=1)
    even = torch.arange(groups)[:, None] % 2 == 0
    histogram = LogHistogram(groups)
    histogram.update(torch.where(even, power_law, exponential), torch.arange(groups))
    return histogram


def test_every_group_gets_its_own_kind() -> None:
    histogram = mixed_histogram()
    fits = decide_by_likelihood(histogram)
    assert [fit.kind for fit in fits] == ["log", "uniform"] * 10
    assert all(fit.reliable for fit in fits)
    for group in (0, 1):
        assert abs(fits[group].R - fit_tail(histogram.counts[group], histogram.edges).R) < 1e-9


def test_sharply_peaked_attention_is_log_and_flat_attention_is_uniform() -> None:
    scores = torch.randn(2, 4, 64, 256, generator=torch.Generator().manual_seed(0))
    histogram = LogHistogram(2)
    histogram.update((scores * torch.tensor([0.2, 4.0])[:, None, None, None]).softmax(-1), torch.tensor([0, 1]))
    assert [fit.kind for fit in decide_by_likelihood(histogram)] == ["uniform", "log"]


def test_decision_for_20_groups_is_fast() -> None:
    histogram = mixed_histogram()
    decide_by_likelihood(histogram)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        decide_by_likelihood(histogram)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0  # about 0.07 s; the margin is for a busy machine


@pytest.mark.parametrize("family", ["log2", "log_sqrt2", "adalog"])
def test_error_rule_picks_the_smaller_output_error(make_twins: Any, initialized: Any, family: Any) -> None:
    daq = DAQConfig(rule="error", family=family)
    twins = make_twins(samples=16)
    unit, data, choices = initialized(twins, ATTENTION, daq=daq)
    choice = choices.attention[SOFTMAX]
    assert torch.equal(choice.logarithmic, choice.by_error)
    assert torch.equal(choice.by_error, choice.log_error < choice.uniform_error)
    quantizer = quantizers(unit)[SOFTMAX]
    assert isinstance(quantizer, SoftmaxQuantizer)
    assert torch.equal(quantizer.tau > 0, choice.logarithmic)

    # the recorded error of what was chosen, computed anew by the module itself
    probes = data.select(probe_indices(data.groups, 2, 40))
    inputs = capture_inputs(unit, probes, twins.timestep_groups, CPU)
    p, values = inputs[SOFTMAX], inputs["processor.value"]
    heads = p.shape[1]
    v = values.view(len(probes), -1, heads, values.shape[-1] // heads).transpose(1, 2)
    with twins.timestep_groups.using(probes.groups):
        quantized = quantizer(p)
    for g in range(2):
        mine = probes.groups == g
        difference, reference = ((quantized - p) @ v)[mine], (p @ v)[mine]
        expected = difference.square().sum() / reference.square().sum()
        torch.testing.assert_close(
            torch.minimum(choice.log_error, choice.uniform_error)[g], expected, rtol=1e-3, atol=0
        )


def test_likelihood_rule_follows_the_fits_and_both_are_recorded(make_twins: Any, initialized: Any) -> None:
    unit, _, choices = initialized(make_twins(samples=16), ATTENTION, daq=DAQConfig(rule="likelihood"))
    choice = choices.attention[SOFTMAX]
    assert choice.logarithmic.tolist() == choice.by_likelihood.tolist() == [fit.R > 0 for fit in choice.fits]
    assert torch.equal(quantizers(unit)[SOFTMAX].tau > 0, choice.logarithmic)
    record = choice.to_dict()
    assert set(record) >= {"logarithmic", "by_likelihood", "by_error", "uniform_error", "log_error", "R", "reliable"}
    assert all(len(v) == 2 for v in record.values())


def test_without_daq_every_group_is_uniform(make_twins: Any, initialized: Any) -> None:
    unit, _, choices = initialized(make_twins(samples=16), ATTENTION, daq=DAQConfig(enabled=False))
    assert not choices.attention[SOFTMAX].logarithmic.any()
    assert not quantizers(unit)[SOFTMAX].tau.any()


def test_a_rule_is_found_by_name(make_twins: Any, initialized: Any) -> None:
    @RULES.register("test_daq.every_other")
    def every_other(evidence: Evidence) -> Tensor:
        return torch.arange(len(evidence.fits)) % 2 == 0

    rule: Any = "test_daq.every_other"
    unit, _, choices = initialized(make_twins(samples=16), ATTENTION, daq=DAQConfig(rule=rule))
    assert choices.attention[SOFTMAX].logarithmic.tolist() == [True, False]
    assert (quantizers(unit)[SOFTMAX].tau > 0).tolist() == [True, False]
    rule = "errors"
    with pytest.raises(UserError, match=r"unknown daq.rule 'errors'; expected one of .*error"):
        initialized(make_twins(samples=16), ATTENTION, daq=DAQConfig(rule=rule))
