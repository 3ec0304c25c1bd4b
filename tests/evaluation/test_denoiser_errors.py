from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tcaq_lightning.evaluation.denoiser_errors import NoiseError, image_error, noise_error
from tcaq_lightning.models.trajectories import Trajectories


class Toy(nn.Module):
    """eps = x * scale + t / 1000 + shift."""

    def __init__(self, scale: float, shift: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.shift = shift

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor, ...]:
        return (sample * self.scale + timestep.view(-1, 1, 1, 1) / 1000 + self.shift,)


def trajectories(steps: int = 3, count: int = 5) -> Trajectories:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(steps, count, 2, 4, 4, generator=generator)
    return Trajectories(inputs, torch.arange(steps).flip(0) * 100, torch.zeros(count, 2, 4, 4))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_noise_error_against_a_loop(batch_size: int) -> None:
    full, quantized, data = Toy(1.0), Toy(1.1, 0.05), trajectories()
    result = noise_error(full, quantized, data, batch_size)
    for s, t in enumerate(data.timesteps):
        squared, power, total, count = 0.0, 0.0, 0.0, 0
        for x in data.inputs[s]:
            for value in x.flatten().tolist():
                f = value + float(t) / 1000
                difference = value * 1.1 + float(t) / 1000 + 0.05 - f
                squared, power = squared + difference**2, power + f**2
                total, count = total + difference, count + 1
        assert float(result.relative[s]) == pytest.approx(squared / power, rel=1e-4)
        assert float(result.bias[s]) == pytest.approx(total / count, rel=1e-4)
    assert result.timesteps.tolist() == [200, 100, 0]
    assert result.summary == pytest.approx(float(result.relative[:2].mean()))


def test_equal_models_have_no_error() -> None:
    result = noise_error(Toy(0.7), Toy(0.7), trajectories(), 2)
    assert result.relative.tolist() == [0, 0, 0]
    assert result.summary == 0


def test_a_lone_last_step_is_its_own_summary() -> None:
    assert NoiseError(torch.zeros(1), torch.tensor([0.5]), torch.zeros(1)).summary == 0.5


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 4.0))
def test_image_error_against_a_loop(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    full, quantized = (torch.randn(3, 1, 3, 3, generator=generator) * spread for _ in range(2))
    squared, by_image = 0.0, []
    for f_image, q_image in zip(full, quantized, strict=True):
        clipped = 0.0
        for f, q in zip(f_image.flatten().tolist(), q_image.flatten().tolist(), strict=True):
            squared += (f - q) ** 2
            clipped += (min(max(f, -1), 1) - min(max(q, -1), 1)) ** 2
        by_image.append(clipped / f_image.numel())
    result = image_error(quantized, full)
    expected = {"mse": sum(by_image) / 3, "mse_median": sorted(by_image)[1], "mse_worst": max(by_image)}
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-5)
        ratio = getattr(result, name.replace("mse", "psnr"))
        assert ratio == pytest.approx(10 * math.log10(4 / value) if value else math.inf, rel=1e-5)
    assert result.mse_unclipped == pytest.approx(squared / full.numel(), rel=1e-5)


def test_one_diverging_image_rules_the_unclipped_mean_alone() -> None:
    full = torch.zeros(5, 1, 2, 2)
    quantized = full + 0.1
    quantized[0] = 1e6
    result = image_error(quantized, full)
    assert result.mse_unclipped > 1e11
    assert result.mse == pytest.approx((1 + 4 * 0.01) / 5)
    assert (result.mse_median, result.mse_worst) == (pytest.approx(0.01), 1)
    assert result.psnr_worst == pytest.approx(10 * math.log10(4))


def test_an_image_of_nan_is_the_worst() -> None:
    full = torch.zeros(3, 1, 2, 2)
    quantized = full.clone()
    quantized[1] = torch.nan
    result = image_error(quantized, full)
    assert (result.mse_median, result.mse_worst, result.psnr_worst) == (0, math.inf, -math.inf)
    assert math.isnan(result.mse)
