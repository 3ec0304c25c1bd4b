"""Floating-point grids against ml_dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tcaq_lightning.quantizers import FORMATS, make_format
from tcaq_lightning.quantizers.formats.floating import FloatFormat

ml_dtypes = pytest.importorskip("ml_dtypes")
KNOWN = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e3m4": "float8_e3m4",  # has infinities, so that it ends earlier
    "e3m2": "float6_e3m2fn",
    "e2m3": "float6_e2m3fn",
    "e2m1": "float4_e2m1fn",
}
OWN = ("e2m5",)
ENDS = {"e4m3": 448, "e5m2": 57_344, "e3m4": 31, "e2m5": 7.875, "e3m2": 28, "e2m3": 7.5, "e2m1": 6}


def made(name: str) -> FloatFormat:
    found = make_format(name, FORMATS[name].widths[0])
    assert isinstance(found, FloatFormat)
    return found


def finite(name: str) -> NDArray[np.float32]:
    """All numbers of a format by ml_dtypes, ascending, with both zeros."""
    codes = np.arange(2 ** made(name).bits, dtype=np.uint8)
    numbers = codes.view(getattr(ml_dtypes, KNOWN[name])).astype(np.float32)
    return np.sort(numbers[np.isfinite(numbers)])


def difficult(name: str) -> NDArray[np.float32]:
    """Random, extreme, subnormal values, those halfway between numbers, and the ones beside all of these."""
    grid = finite(name)
    middles = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    random = np.random.default_rng(0).standard_normal((6, 20_000)).astype(np.float32)
    scales = np.array([1e-8, 1e-4, 0.01, 1, 10, 1000], np.float32)[:, None]
    points = np.concatenate([grid, middles, np.float32([0.0, -0.0, 1e-40, -1e-40])])
    beside = [np.nextafter(points, np.float32(side)) for side in (-np.inf, np.inf)]
    values = np.concatenate([(random * scales).ravel(), points, *beside]).astype(np.float32)
    return values[np.abs(values) <= grid[-1]]


@pytest.mark.parametrize("name", KNOWN)
def test_codes_are_those_of_ml_dtypes(name: str) -> None:
    values, number_format = difficult(name), made(name)
    expected = values.astype(getattr(ml_dtypes, KNOWN[name]))
    nearest = number_format.nearest(torch.from_numpy(values))
    assert np.array_equal(nearest.numpy(), expected.astype(np.float32))
    codes = number_format.encode(nearest)
    assert np.array_equal(codes.numpy().astype(np.uint8), expected.view(np.uint8))
    assert torch.equal(number_format.decode(codes), nearest)


@pytest.mark.parametrize("name", KNOWN)
def test_every_code_stands_for_the_number_of_ml_dtypes(name: str) -> None:
    codes = np.arange(2 ** made(name).bits, dtype=np.uint8)
    expected = codes.view(getattr(ml_dtypes, KNOWN[name])).astype(np.float32)
    numbers = made(name).decode(torch.from_numpy(codes.astype(np.float32))).numpy()
    usual = np.isfinite(expected)
    assert np.array_equal(numbers[usual], expected[usual])
    if name != "e3m4":
        assert np.isnan(numbers[~usual]).all()


@pytest.mark.parametrize("name", [*KNOWN, *OWN])
def test_neighbours_enclose_values_on_the_whole_grid(name: str) -> None:
    number_format = made(name)
    grid = number_format.decode(torch.arange(2.0**number_format.bits))
    grid = grid[grid.isfinite()].unique()
    assert number_format.ends == (-ENDS[name], ENDS[name])
    middles = (grid[1:] + grid[:-1]) / 2
    beyond = torch.tensor([-1e30, -2 * ENDS[name], 2 * ENDS[name], 1e30])
    values = torch.cat([grid, middles, torch.nextafter(grid, grid + 1), torch.nextafter(grid, grid - 1), beyond])
    below, above = number_format.neighbours(values)
    after = torch.searchsorted(grid, values, right=True)
    assert torch.equal(below, grid[(after - 1).clamp(min=0)])
    outside = values < grid[0]
    assert torch.equal(above[~outside], grid[after.clamp(max=len(grid) - 1)][~outside])
    assert torch.equal(above[outside], below[outside])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([*KNOWN, *OWN]), st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8))
def test_the_nearest_number_is_a_neighbour_and_stays(name: str, values: list[float]) -> None:
    number_format, x = made(name), torch.tensor(values)
    nearest = number_format.nearest(x)
    below, above = number_format.neighbours(x)
    assert bool(((nearest == below) | (nearest == above)).all())
    assert torch.equal(number_format.nearest(nearest), nearest)
    assert torch.equal(number_format.nearest(-x), -nearest)


def test_a_real_valued_bias_is_a_scale() -> None:
    """Kuzmin et al. 2022, equation 3: numbers 2^(p - b) (1 + ...) with a real b are 2^-b times those without."""
    number_format, x = made("e3m4"), torch.linspace(-4, 4, 999)
    scale = torch.tensor(2.0**-2.9)
    quantized = number_format.fake_quantize(x, scale)
    assert float((quantized - x).abs().max()) <= float(scale) / 2 * 1.00001  # numbers lie 1 apart at the end
    searched = number_format.search(x[None]).scale
    error = (number_format.fake_quantize(x, searched) - x).abs().pow(2.4).sum()
    assert error <= (quantized - x).abs().pow(2.4).sum()
