from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tcaq_lightning.calibration.probes import capture_inputs, probe_indices
from tcaq_lightning.config import LayerRule, QuantizationConfig
from tcaq_lightning.nn.parts import quantizers

CPU = torch.device("cpu")
ATTENTION, RESNET = "mid_block.attentions.0", "mid_block.resnets.0"
SOFTMAX = "processor.probabilities"


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 50))
def test_probes_are_balanced_sorted_and_distinct(drawn: list[int], total: int) -> None:
    groups = torch.tensor([0, 1, 2, 3, *drawn])
    probe = probe_indices(groups, 4, total)
    each = torch.bincount(groups[probe], minlength=4)
    assert len(set(each.tolist())) == 1
    assert each[0] == min(max(1, total // 4), int(torch.bincount(groups).min()))
    assert groups[probe].tolist() == sorted(groups[probe].tolist())
    assert len(set(probe.tolist())) == len(probe)


def test_captured_inputs_are_full_precision_ones(make_twins: Any) -> None:
    twins = make_twins()
    unit, data = twins.unit(RESNET), twins.data_of(RESNET)
    probe = probe_indices(data.groups, 2, 40)
    captured = capture_inputs(unit, data.select(probe), twins.timestep_groups, CPU)
    assert set(captured) == set(quantizers(unit))
    assert all(len(v) == len(probe) for v in captured.values())
    assert all(not q._forward_pre_hooks for q in quantizers(unit).values())
    full = twins.full.get_submodule(RESNET)
    seen: list[Tensor] = []
    full.conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    data.run(full, twins.timestep_groups, probe, CPU)
    torch.testing.assert_close(captured["conv2.input_quantizer"], seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [RESNET, ATTENTION, "time_embedding"])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_inputs_are_captured_batch_by_batch(make_twins: Any, name: str, batch_size: int) -> None:
    twins = make_twins()
    arguments = twins.unit(name), twins.data_of(name).select(torch.tensor([5, 0, 3, 2])), twins.timestep_groups, CPU
    whole, parts = capture_inputs(*arguments), capture_inputs(*arguments, batch_size)
    assert whole.keys() == parts.keys()
    for key, x in whole.items():
        torch.testing.assert_close(parts[key], x)


def test_an_input_that_several_layers_read_is_captured_once_a_pass(make_twins: Any) -> None:
    rules = [LayerRule(pattern=ATTENTION, keep=True)]  # its layers stay quantized, and diffusers' processor calls them
    twins = make_twins(QuantizationConfig(rules=rules))
    unit, data = twins.unit(ATTENTION), twins.data_of(ATTENTION).select(torch.tensor([5, 0, 3, 2]))
    shared = "to_q.input_quantizer"
    assert SOFTMAX not in quantizers(unit)
    captured = capture_inputs(unit, data, twins.timestep_groups, CPU, 3)
    each = [
        capture_inputs(unit, data.select(slice(i, i + 1)), twins.timestep_groups, CPU)[shared] for i in range(len(data))
    ]
    torch.testing.assert_close(captured[shared], torch.cat(each))
    assert len(captured[shared]) == len(data)


def test_kept_queries_of_captured_probabilities_hold_the_largest_value(
    make_twins: Any,
) -> None:
    twins = make_twins()
    arguments = twins.unit(ATTENTION), twins.data_of(ATTENTION).select(slice(4)), twins.timestep_groups, CPU, 3
    everything = capture_inputs(*arguments)
    p = everything[SOFTMAX]
    kept = p.shape[2] // 3
    some = capture_inputs(*arguments, kept)
    assert some[SOFTMAX].shape == (*p.shape[:2], kept, p.shape[3])
    assert some[SOFTMAX].untyped_storage().nbytes() == some[SOFTMAX].nbytes
    assert torch.equal(some[SOFTMAX].amax((1, 2, 3)), p.amax((1, 2, 3)))
    for mine, all_queries in zip(some[SOFTMAX].transpose(1, 2), p.transpose(1, 2), strict=True):
        found = (mine[:, None] == all_queries).flatten(2).all(2)  # (kept, T): the same query of all heads
        assert found.any(1).all()
        assert found.any(0).sum() >= kept - 1  # the one with the largest value may have been drawn too
    assert all(torch.equal(some[key], x) for key, x in everything.items() if key != SOFTMAX)
