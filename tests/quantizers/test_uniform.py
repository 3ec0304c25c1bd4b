from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tcaq_lightning.quantizers import uniform
from tcaq_lightning.quantizers.uniform import affine_range, fake_quantize

values = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-50, 50, width=32))
steps = st.floats(0.0078125, 4, width=32)
widths = st.integers(2, 8)


def limits(bits: int, zero: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(float(-zero)), torch.tensor(float(2**bits - 1 - zero))


def reference(x: np.ndarray, step: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    q = np.clip(np.rint(x / step) + zero, 0, 2**bits - 1)
    return step * (q - zero)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_definition(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(3, 5, 7)).astype(np.float32) * 4
    step = rng.uniform(0.05, 1, size=(3, 1, 1)).astype(np.float32)
    zero = np.full((3, 1, 1), 2 ** (bits - 1)) if symmetric else rng.integers(0, 2**bits, size=(3, 1, 1))
    zero = zero.astype(np.float32)
    x[0, 0] = step[0] * np.array([-1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 1e3])  # ties go to even
    low = torch.from_numpy(-zero)
    got = fake_quantize(torch.from_numpy(x), torch.from_numpy(step), low, low + 2**bits - 1)
    np.testing.assert_array_equal(got.numpy(), reference(x, step, zero, bits))


@pytest.mark.parametrize("steps_shape", [(7, 1, 1), (7, 3, 1), (1, 3, 1), (1, 1, 1)])
def test_blocks_of_rows_give_the_bits_of_the_whole(
    steps_shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 5, generator=generator)
    step = torch.rand(steps_shape, generator=generator) * 0.3 + 0.1
    zero = torch.randint(0, 16, (7, 1, 1), generator=generator).float()
    upstream = torch.randn(7, 3, 5, generator=generator)

    def results() -> list[torch.Tensor]:
        operands = x.clone().requires_grad_(), step.clone().requires_grad_()
        quantized = fake_quantize(*operands, -zero, 15 - zero)
        quantized.backward(upstream)
        return [quantized.detach(), *(t.grad for t in operands if t.grad is not None)]

    whole = results()
    monkeypatch.setattr(uniform, "LARGE", 30 // torch.get_num_threads())  # two rows, and one in the last block
    assert len(whole) == 3
    assert all(torch.equal(a, b) for a, b in zip(results(), whole, strict=True))


def test_the_step_gradient_of_narrow_inputs_is_that_of_wide_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 30, generator=generator).bfloat16()
    upstream = torch.randn(4, 30, generator=generator)
    low, high = limits(4, 8)
    gradients = []
    for values in (x, x.float()):
        step = torch.full((4, 1), 0.2, requires_grad=True)
        fake_quantize(values.requires_grad_(), step, low, high).backward(upstream)
        assert values.grad is not None
        assert values.grad.dtype is values.dtype
        gradients.append(step.grad)
    assert torch.equal(*gradients)


def test_a_transposed_gradient_gives_what_a_contiguous_one_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 5, generator=generator)
    upstream = torch.randn(4, 5, 6, generator=generator).transpose(1, 2)
    low, high = limits(4, 8)
    gradients = []
    for gradient in (upstream, upstream.contiguous()):
        values, step = x.clone().requires_grad_(), torch.full((4, 1, 1), 0.2, requires_grad=True)
        fake_quantize(values, step, low, high).backward(gradient)
        gradients.append((values.grad, step.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def learnable(bits: int, zero: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits)
    x = (torch.randn(4, 3, 5, generator=generator) * 2).requires_grad_()
    step = (torch.rand(4, generator=generator) * 0.3 + 0.1).requires_grad_()
    return x, step, torch.randn(4, 3, 5, generator=generator)


@pytest.mark.parametrize(("bits", "zero"), [(2, 2), (4, 8), (4, 3), (8, 0)])
def test_gradients_equal_the_formulas(bits: int, zero: int) -> None:
    x, step, upstream = learnable(bits, zero)
    low, high = limits(bits, zero)
    fake_quantize(x, step.view(4, 1, 1), low, high).backward(upstream)
    expected_x, expected_step = torch.zeros_like(x), torch.zeros_like(step)
    for index in np.ndindex(*x.shape):
        ratio = x[index].item() / step[index[0]].item()
        code = round(ratio)
        if -zero <= code <= 2**bits - 1 - zero:
            expected_x[index] = upstream[index]
            slope = code - ratio
        else:
            slope = min(max(code, -zero), 2**bits - 1 - zero)
        expected_step[index[0]] += upstream[index] * slope
    assert x.grad is not None
    assert step.grad is not None
    assert torch.equal(x.grad, expected_x)
    torch.testing.assert_close(step.grad, expected_step, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "zero"), [(2, 2), (4, 8), (4, 3), (8, 0)])
def test_agrees_with_torchs_own_learnable_kernels(bits: int, zero: int) -> None:
    x, step, upstream = learnable(bits, zero)
    ours = fake_quantize(x, step.view(4, 1, 1), *limits(bits, zero))
    gradients = torch.autograd.grad(ours, (x, step), upstream)
    zeros = torch.full((4,), float(zero))
    native = torch._fake_quantize_learnable_per_channel_affine(x, step, zeros, 0, 0, 2**bits - 1, 1.0)
    torch.testing.assert_close(ours, native)
    torch.testing.assert_close(gradients, torch.autograd.grad(native, (x, step), upstream), rtol=1e-4, atol=1e-4)

    single = step[:1].detach().requires_grad_()
    ours = fake_quantize(x, single, *limits(bits, zero))
    native = torch._fake_quantize_learnable_per_tensor_affine(x, single, zeros[:1], 0, 2**bits - 1, 1.0)
    torch.testing.assert_close(ours, native)
    gradients = torch.autograd.grad(ours, (x, single), upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(native, (x, single), upstream), rtol=1e-4, atol=1e-4)


@given(values, steps, widths, st.data())
def test_properties(x: np.ndarray, step: float, bits: int, data: st.DataObject) -> None:
    zero = data.draw(st.integers(0, 2**bits - 1))
    low, high = limits(bits, zero)
    s, t = torch.tensor(step), torch.from_numpy(x)
    once = fake_quantize(t, s, low, high)
    assert torch.equal(fake_quantize(once, s, low, high), once)
    codes = (once / s).round()
    assert torch.equal(codes * s, once)
    assert bool(((codes >= low) & (codes <= high)).all())
    inside = (t >= low * s) & (t <= high * s)
    assert bool(((once - t).abs()[inside] <= step / 2 * (1 + 1e-5) + 1e-6 * t.abs()[inside]).all())
    assert fake_quantize(torch.zeros(1), s, low, high).item() == 0


@given(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32), widths)
def test_affine_range_covers_and_represents_zero(a: float, b: float, bits: int) -> None:
    low, high = min(a, b), max(a, b)
    delta, zero = affine_range(torch.tensor(low), torch.tensor(high), bits)
    assert delta > 0
    assert zero == zero.round()
    assert 0 <= zero <= 2**bits - 1
    if low >= 0:
        assert zero == 0
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)])
    error = (fake_quantize(ends, delta, -zero, 2**bits - 1 - zero) - ends).abs().max()
    assert error <= delta * 0.5001  # an end moves by half a step at most, since zero is a code
