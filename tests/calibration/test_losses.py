from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.calibration.losses import block_error, channel_errors


@given(st.integers(1, 5), st.integers(1, 6))
def test_block_error_equals_loops(batch: int, channels: int) -> None:
    for shape, channel_dim in (((batch, channels, 3, 2), 1), ((batch, 4, channels), 2), ((batch, channels), 1)):
        output, target = torch.randn(shape), torch.randn(shape)
        squares = (output - target).square().movedim(channel_dim, -1).reshape(-1, channels)
        expected = sum(sum(row) for row in squares.tolist()) / len(squares)
        assert block_error(output, target).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 2, 4, 5, 2), (3, 6, 4), (3, 4)])
def test_channel_errors_and_their_gradient_equal_autograds(shape: tuple[int, ...]) -> None:
    output, target = torch.randn(shape, dtype=torch.float64).requires_grad_(), torch.randn(shape, dtype=torch.float64)
    axes = {4: (2, 3), 5: (1, 3, 4), 3: (1,), 2: ()}[len(shape)]
    difference = output - target
    expected = difference.square().mean(axes) if axes else difference.square()
    squares, errors = channel_errors(output, target)
    torch.testing.assert_close(squares, expected)
    torch.testing.assert_close(errors, difference.detach().mean(axes) if axes else difference.detach())
    assert not errors.requires_grad
    weights = torch.rand(squares.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * weights).sum(), output, retain_graph=True)[0] for x in (squares, expected)]
    torch.testing.assert_close(*gradients)
