from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.quantizers import (
    AdaRoundWeight,
    FloatScales,
    LevelTable,
    NumberFormat,
    Rounding,
    Sharing,
    make_format,
)
from tcaq_lightning.quantizers.uniform import fake_quantize


class Table(LevelTable):
    """The integers of 4 bits as a table of levels."""

    def levels(self) -> list[float]:
        return [float(n) for n in range(-8, 8)]


class HalfScales(Table):
    """The same with scales that the artifact holds in 16 bits."""

    scale_type = FloatScales(torch.float16)


def grid_of(made: NumberFormat, zero: Tensor | None) -> Tensor:
    return made.decode(torch.arange(2.0**made.bits), zero)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 255), st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=8))
def test_neighbours_of_integers_enclose_a_value(bits: int, zero: int, values: list[float]) -> None:
    made, z, x = make_format("int", bits), torch.tensor(float(zero % 2**bits)), torch.tensor(values)
    below, above = made.neighbours(x, z)
    grid = grid_of(made, z)
    for value, lower, upper in zip(x, below, above, strict=True):
        assert lower in grid
        assert upper in grid
        if grid[0] <= value < grid[-1]:
            assert lower <= value < upper
            assert upper - lower == 1
        else:
            assert lower == upper == value.clamp(grid[0], grid[-1])
    assert torch.equal(made.decode(made.encode(below, z), z), below)
    assert torch.equal(made.rounded(x, torch.ones_like(x, dtype=torch.bool), z), made.encode(above, z))
    assert torch.equal(made.rounded(x, torch.zeros_like(x, dtype=torch.bool), z), made.encode(below, z))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=8))
def test_a_table_of_integers_is_the_integer_format(values: list[float]) -> None:
    x, table, integers = torch.tensor(values), Table(4), make_format("int", 4)
    for got, expected in zip(table.neighbours(x), integers.neighbours(x), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(table.rounded(x, None), integers.rounded(x, None))
    assert torch.equal(table.decode(torch.arange(16.0)), grid_of(integers, None))


def test_gradients_of_the_general_fake_quantization_are_those_of_integers() -> None:
    x = torch.cat([torch.linspace(-7, 6.2, 37), torch.tensor([-20.0, -9.0, 8.0, 20.0])])  # half a step past no end
    found = []
    for quantize in (
        lambda x, s: Table(4).fake_quantize(x, s),
        lambda x, s: fake_quantize(x, s, torch.tensor(-8.0), torch.tensor(7.0)),
    ):
        value, scale = x.clone().requires_grad_(), torch.tensor(0.9, requires_grad=True)
        y = quantize(value, scale)
        (y * torch.linspace(1, 2, 41)).sum().backward()
        found.append((y.detach(), value.grad, scale.grad))
    for got, expected in zip(*found, strict=True):
        assert got is not None
        torch.testing.assert_close(got, expected)


def test_learned_rounding_by_neighbours_is_that_of_integers() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    r = torch.rand(4, generator=torch.Generator().manual_seed(1)) + 0.5
    made = [AdaRoundWeight(weight, number_format) for number_format in (Table(4), make_format("int", 4))]
    made[1].search(r)
    made[0].delta.copy_(made[1].delta)
    made[0].reset_rounding(r)
    assert torch.equal(made[0].logits, made[1].logits)
    assert torch.equal(made[0].codes(r), made[1].codes(r))
    torch.testing.assert_close(made[0](r), made[1](r))
    gradients = []
    for quantizer in made:
        learned = quantizer.begin_learning(Rounding.SOFT, r)
        quantizer(r).square().sum().backward()
        gradients.append([p.grad for kind in sorted(learned) for p in learned[kind]])
        quantizer.end_learning()
    torch.testing.assert_close(*gradients)


def test_groups_share_scales_in_their_order() -> None:
    weight = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    sharing = Sharing(group=2)
    rows = sharing.rows(weight)
    assert rows.shape == (6, 6)
    for output in range(2):
        for group in range(3):
            part = weight[output, 2 * group : 2 * group + 2].flatten()
            assert torch.equal(rows[3 * output + group][: len(part)], part)
            assert not rows[3 * output + group][len(part) :].any()
    scales = torch.arange(1.0, 7.0).view(sharing.shape((2, 5, 3)))
    beside = sharing.spread(scales, weight)
    assert beside[:, :, 0].tolist() == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    whole = Sharing(whole=True)
    assert whole.rows(weight).shape == (1, 30)
    assert whole.spread(torch.ones(whole.shape((2, 5, 3))), weight).expand_as(weight).shape == weight.shape


def test_scales_are_those_that_the_artifact_can_hold() -> None:
    quantizer = AdaRoundWeight(torch.randn(6, 4), HalfScales(4))
    quantizer.search(torch.ones(4))
    assert torch.equal(quantizer.scale.half().float(), quantizer.scale)
    learned = quantizer.begin_learning(Rounding.NEAREST, torch.ones(4))
    with torch.no_grad():
        learned["weight_scales"][0].fill_(0.1)
    quantizer.end_learning()
    assert torch.equal(quantizer.scale.half().float(), quantizer.scale)


def test_an_unknown_format_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="unknown number format 'fp17'; expected one of e2m1") as caught:
        make_format("fp17", 4)
    assert "\n" not in str(caught.value)
