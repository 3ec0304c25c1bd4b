from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcaq_lightning.quantizers import OutputQuantizer


def made(channels: int, channel_dim: int, seed: int = 0) -> tuple[OutputQuantizer, Tensor]:
    """A quantizer with random parameters, and scales of a weight."""
    generator = torch.Generator().manual_seed(seed)
    quantizer = OutputQuantizer(channels, channel_dim)
    quantizer.delta.copy_(0.5 + torch.rand(channels, generator=generator))
    quantizer.offset.copy_(torch.randint(-300, 300, (channels,), generator=generator))
    return quantizer, 0.1 + torch.rand(channels, generator=generator)


@pytest.mark.parametrize("convolution", [True, False])
def test_it_computes_the_formula(convolution: bool) -> None:
    quantizer, scale = made(3, 1 if convolution else -1)
    shape = (4, 3, 5, 6) if convolution else (4, 7, 3)
    y = 60 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([0.3, 0.5, 1.0, 2.0])
    got = quantizer(y, steps.view(-1, *[1] * (len(shape) - 1)), scale).numpy()
    for b, s in enumerate(steps.double().tolist()):
        for o in range(3):
            here = (b, o) if convolution else (b, slice(None), o)
            delta, shift = float(quantizer.delta[o]), float(scale[o]) * float(quantizer.offset[o])
            code = np.clip(np.rint((y.double().numpy()[here] / s + shift) / delta), -128, 127)
            np.testing.assert_allclose(got[here], s * (delta * code - shift), rtol=1e-4, atol=1e-4)


def test_off_it_changes_nothing() -> None:
    quantizer, scale = made(3, 1)
    quantizer.enabled = False
    y = torch.randn(2, 3, 4, 4)
    assert quantizer(y, torch.ones(2, 1, 1, 1), scale) is y


@settings(max_examples=30, deadline=None)
@given(centre=st.floats(-1e4, 1e4), spread=st.floats(1e-2, 1e3), sums=st.floats(1e3, 1e6))
def test_the_search_covers_any_range_with_all_codes(centre: float, spread: float, sums: float) -> None:
    """Per channel, wherever its values lie: an error as of a grid of 256 steps over the range, or better."""
    generator = torch.Generator().manual_seed(0)
    values = centre + spread * torch.rand(2, 3, 16, 16, generator=generator)
    values[:, 1] *= 10
    quantizer, scales = OutputQuantizer(3, 1), torch.full((3,), spread / sums)
    quantizer.search(values, scales)
    error = (quantizer(values, torch.ones(2, 1, 1, 1), scales) - values).square().mean((0, 2, 3)).sqrt()
    width = values.amax((0, 2, 3)) - values.amin((0, 2, 3))
    resolution = 1e-6 * values.abs().amax((0, 2, 3))  # of float32
    assert bool((error < 1.1 * width / 255 / 12**0.5 + resolution).all())
    assert torch.equal(quantizer.offset, quantizer.offset.round())


def test_few_sums_are_exact() -> None:
    scale = torch.tensor([0.3, 0.02])
    sums = torch.randint(-90, 110, (2, 2, 8, 8), generator=torch.Generator().manual_seed(0)) + 1000
    values = sums * scale.view(1, 2, 1, 1)
    quantizer = OutputQuantizer(2, 1)
    quantizer.search(values, scale)
    torch.testing.assert_close(quantizer(values, torch.ones(2, 1, 1, 1), scale), values)


def test_headroom_widens_the_range() -> None:
    values = torch.rand(1, 2, 32, 32)
    plain, wide = OutputQuantizer(2, 1), OutputQuantizer(2, 1)
    plain.search(values, torch.ones(2) / 1000)
    wide.search(values, torch.ones(2) / 1000, headroom=1.5)
    torch.testing.assert_close(wide.delta, 1.5 * plain.delta)
    beyond = values * 1.2
    errors = [(q(beyond, torch.ones(1, 1, 1, 1), torch.ones(2) / 1000) - beyond).abs().max() for q in (plain, wide)]
    assert errors[1] < 0.5 * errors[0]


def test_another_scale_of_the_weight_leaves_the_range() -> None:
    quantizer, scale = made(3, 1)
    quantizer.offset.mul_(1000)
    y = 60 * torch.randn(2, 3, 8, 8)
    before = quantizer(y, torch.ones(2, 1, 1, 1), scale)
    quantizer.rescale(scale, scale * 0.7)
    assert torch.equal(quantizer.offset, quantizer.offset.round())
    after = quantizer(y, torch.ones(2, 1, 1, 1), scale * 0.7)
    assert (before - after).square().mean() < 0.1 * (before - y).square().mean()


def test_gradients_pass_within_the_range_and_reach_both_steps() -> None:
    quantizer, scale = made(2, 1)
    quantizer.offset.zero_()
    quantizer.delta.fill_(1.0)
    (log_delta,) = quantizer.begin_learning()["steps"]
    y = torch.tensor([3.3, 500.0]).view(1, 2, 1, 1).requires_grad_()
    step = torch.tensor(1.0).view(1, 1, 1, 1).requires_grad_()
    quantizer(y, step, scale).sum().backward()
    assert y.grad is not None
    assert y.grad.flatten().tolist() == [1.0, 0.0]
    # LSQ: round(y) - y inside, the last code outside; both steps are factors of the product
    expected = torch.tensor([3 - 3.3, 127.0])
    torch.testing.assert_close(log_delta.grad, expected)
    torch.testing.assert_close(step.grad.flatten(), expected.sum()[None])  # type: ignore[union-attr]
    with torch.no_grad():
        log_delta.copy_(torch.tensor([0.0, 0.5]))
    quantizer.end_learning()
    torch.testing.assert_close(quantizer.delta, torch.tensor([0.0, 0.5]).exp())
    assert not list(quantizer.parameters())
