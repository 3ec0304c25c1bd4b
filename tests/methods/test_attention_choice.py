from __future__ import annotations

from typing import Any

import pytest
import torch

from tcaq_lightning.calibration.probes import capture_inputs, probe_indices
from tcaq_lightning.config import DAQConfig
from tcaq_lightning.nn.parts import quantizers
from tcaq_lightning.quantizers import SoftmaxQuantizer

CPU = torch.device("cpu")
ATTENTION = "mid_block.attentions.0"
SOFTMAX = "processor.probabilities"


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
    inputs = capture_inputs(unit, probes, twins.context, CPU)
    p, values = inputs[SOFTMAX], inputs["processor.value"]
    heads = p.shape[1]
    v = values.view(len(probes), -1, heads, values.shape[-1] // heads).transpose(1, 2)
    with twins.context.using(probes.groups):
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
