from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tcaq_lightning.calibration.probes import capture_inputs, probe_indices
from tcaq_lightning.config import QuantizationConfig, TCRConfig, WeightConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.methods.reparameterization import (
    QUICK_PLACES,
    REPARAMETERIZATIONS,
    Candidate,
    OutputError,
    Reparameterization,
    choose,
    fewer_probes,
    named,
)
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.quantizers.observers import RangeStatistics
from tcaq_lightning.quantizers.weight import scale_of_inputs

CPU = torch.device("cpu")
ATTENTION, RESNET = "mid_block.attentions.0", "mid_block.resnets.0"


class Proposed(Reparameterization):
    """Proposes what it is told to."""

    def __init__(self, grid: Tensor, shifts: list[Tensor] | None = None) -> None:
        super().__init__()
        self.grid, self.given = grid, shifts or []

    def shifts(self, ranges: RangeStatistics) -> list[Tensor]:
        return self.given

    def candidates(self, ranges: RangeStatistics, weights: Tensor) -> Tensor:
        return self.grid


@pytest.fixture
def searched(make_twins: Any, observe: Any) -> Any:
    """Chooses for the input of a unit's layer: members -> (quantizer, layer, probes, errors)."""

    def run(unit_name: str, layer_name: str, members: dict[str, Reparameterization]) -> Any:
        twins = make_twins(QuantizationConfig(weight=WeightConfig(bits=4)), samples=16)
        unit, data, timestep_groups = twins.unit(unit_name), twins.data_of(unit_name), twins.timestep_groups
        probes = data.select(probe_indices(data.groups, timestep_groups.num_groups, 40))
        x = capture_inputs(unit, probes, timestep_groups, CPU)[f"{layer_name}.input_quantizer"]
        ranges = observe(unit, data, timestep_groups).ranges[f"{layer_name}.input_quantizer"]
        layer = quant_layers(unit)[layer_name]
        timestep_groups.set(probes.groups)
        with torch.no_grad():
            errors = choose(layer.input_quantizer, [layer], x, ranges, members)
        return layer, x, ranges, errors

    return run


@pytest.mark.parametrize(("each", "kept"), [(1, [0]), (2, [0]), (5, [0, 2, 4])])
def test_half_of_the_probes_compare_candidates_where_they_are_enough(each: int, kept: list[int]) -> None:
    groups = torch.arange(3).repeat_interleave(each)
    x = torch.randn(3 * each, 2, 4, 5)
    enough, few = 2 * QUICK_PLACES, 2 * QUICK_PLACES - 1
    for whole, places in ((x, few), (x[:1], enough), (torch.cat([x, x]), enough)):
        some, of_them = fewer_probes(whole, groups, 3, places)
        assert some is whole
        assert of_them is groups
    some, of_them = fewer_probes(x, groups, 3, enough)
    assert torch.equal(some, x.unflatten(0, (3, each))[:, kept].flatten(0, 1))
    assert of_them.tolist() == [g for g in range(3) for _ in kept]


def test_the_candidate_of_least_error_is_chosen_wherever_it_comes_from(searched: Any) -> None:
    channels = 16
    generator = torch.Generator().manual_seed(0)
    wild = torch.exp2(torch.randn(3, channels, generator=generator) * 2)
    mild = torch.exp2(torch.randn(3, channels, generator=generator) * 0.1)
    members: dict[str, Reparameterization] = {"wild": Proposed(wild), "mild": Proposed(mild)}
    layer, x, ranges, (before, after) = searched(RESNET, "conv1", members)
    quantizer = layer.input_quantizer
    zero = torch.zeros(channels)
    with torch.no_grad():
        error_of = OutputError(quantizer, [layer], x, quantizer.groups.current, ranges)
        errors = [error_of(Candidate(r, zero)) for r in torch.cat([wild, mild])]
        assert before == error_of(Candidate(torch.ones(channels), zero))
    assert after == min(errors) < max(errors)
    *_, (_, alone) = searched(RESNET, "conv1", {"wild": members["wild"]})
    assert alone == min(errors[:3]) > after


def test_a_single_candidate_is_taken_as_it_is(searched: Any) -> None:
    r = torch.full((16,), 1.0)
    r[0] = 300.0  # worse than none
    layer, *_, (before, after) = searched(RESNET, "conv1", {"mine": Proposed(r[None])})
    assert after > before
    assert torch.equal(layer.input_quantizer.r, r)


def test_shifts_are_tried_beside_none_where_there_may_be_one(searched: Any) -> None:
    shift = torch.full((16,), 3.0)
    members: dict[str, Reparameterization] = {"mine": Proposed(torch.ones(1, 16), [shift])}
    layer, _, _, (before, after) = searched(ATTENTION, "to_q", members)
    assert after == before  # 3 is far from the centres, and none is among the candidates
    assert not layer.input_quantizer.shift.any()
    layer, *_ = searched(RESNET, "conv1", members)
    assert layer.input_quantizer.shift is None


def test_the_error_equals_one_of_the_layers_themselves(searched: Any) -> None:
    r = torch.exp2(torch.linspace(-1, 1, 16))
    layer, x, ranges, (_, after) = searched(RESNET, "conv1", {"mine": Proposed(r[None])})
    quantizer = layer.input_quantizer
    with torch.no_grad():
        quantizer.search(x, ranges, values=1024, candidates=8, norm=2)
        weight = layer.learned_weight.nearest(r)
        expected = layer.linear_map(x, layer.learned_weight.weight, None)
        difference = layer.linear_map(quantizer(x), weight, None) - expected
    assert after == pytest.approx(float(difference.square().sum() / expected.square().sum()))
    levels = (weight * r.view(1, -1, 1, 1)).flatten(1)
    step = levels.abs().sort(1).values[:, -1:] / 8
    assert all(len(row.unique()) <= 16 for row in levels.div(step).mul(1e4).round())


@pytest.mark.parametrize("grid", [torch.ones(16), torch.ones(2, 3), torch.zeros(1, 16), torch.full((1, 16), torch.nan)])
def test_candidates_that_cannot_be_are_refused(searched: Any, grid: Tensor) -> None:
    with pytest.raises(UserError, match=r"tcr.formula: the candidates of mine must be \(K, 16\), finite and positive"):
        searched(RESNET, "conv1", {"mine": Proposed(grid)})


def test_members_are_found_by_name() -> None:
    assert [m.truncation for m in named(TCRConfig(formula="searched", truncation=3.0)).values()] == [3.0]
    assert list(named(TCRConfig(formula=["searched", "smoothquant"]))) == ["searched", "smoothquant"]
    with pytest.raises(UserError, match=r"unknown tcr.formula 'smooth'; expected one of .*smoothquant"):
        named(TCRConfig(formula="smooth"))


@pytest.mark.parametrize("name", sorted(REPARAMETERIZATIONS))
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_every_candidate_leaves_a_full_precision_layers_output(name: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 3, 3, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 5)[:, None, None]
    weight = torch.randn(7, 5, 3, 3, generator=generator, dtype=torch.float64)
    ranges = RangeStatistics(2, 5)
    ranges.update(x, torch.arange(2).repeat_interleave(3), 1)
    grid = REPARAMETERIZATIONS[name](TCRConfig()).candidates(ranges, weight.abs().amax((0, 2, 3)))
    assert bool((grid[-1] != 1).any())
    for r in grid.double():
        if kind == "conv":
            before = F.conv2d(x, weight, padding=1)
            after = F.conv2d(x / r.view(1, -1, 1, 1), weight * scale_of_inputs(r, weight), padding=1)
        else:
            before = F.linear(x[..., 0, 0], weight[..., 0, 0])
            after = F.linear(x[..., 0, 0] / r, weight[..., 0, 0] * scale_of_inputs(r, weight[..., 0, 0]))
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
