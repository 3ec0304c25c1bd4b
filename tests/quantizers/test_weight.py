from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tcaq_lightning.quantizers import AdaRoundWeight, CodedWeight, PackedWeight, Rounding
from tcaq_lightning.quantizers.adaround import adaround_regularizer
from tcaq_lightning.quantizers.formats import make_format
from tcaq_lightning.quantizers.packing import pack, packed_size
from tcaq_lightning.quantizers.weight import scale_of_inputs

CASES = {
    "linear": ((6, 4), 1),
    "conv": ((6, 4, 3, 3), 1),
    "grouped": ((6, 2, 3, 3), 2),
    "depthwise": ((4, 1, 3, 3), 4),
}


def made(case: str, bits: int = 4, symmetric: bool = True) -> tuple[AdaRoundWeight, Tensor]:
    shape, conv_groups = CASES[case]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) + (0.0 if symmetric else 0.5)
    r = torch.rand(shape[1] * conv_groups, generator=generator) + 0.5
    quantizer = AdaRoundWeight(weight, make_format("int", bits, symmetric), conv_groups)
    quantizer.search(r)
    return quantizer, r


def factor_loop(case: str, r: Tensor) -> Tensor:
    """r_d beside W[o, i]: input channel d = (group of o) * I + i."""
    (outputs, inputs, *rest), conv_groups = CASES[case]
    factor = torch.empty(outputs, inputs)
    for o in range(outputs):
        for i in range(inputs):
            factor[o, i] = r[o // (outputs // conv_groups) * inputs + i]
    return factor.view(outputs, inputs, *[1] * len(rest))


@pytest.mark.parametrize("case", CASES)
def test_r_meets_the_input_channel_that_it_belongs_to(case: str) -> None:
    quantizer, r = made(case)
    got = scale_of_inputs(r, quantizer.weight, quantizer.conv_groups)
    assert torch.equal(got.expand_as(quantizer.weight), factor_loop(case, r).expand_as(quantizer.weight))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_hardened_at_first_is_rounding_to_nearest(case: str, bits: int, symmetric: bool) -> None:
    quantizer, r = made(case, bits, symmetric)
    scaled = quantizer.weight * factor_loop(case, r)
    step = quantizer.delta.view(-1, *[1] * (scaled.ndim - 1))
    zero = quantizer.zero_point.view_as(step)
    codes = (torch.round(scaled / step) + zero).clamp(0, 2**bits - 1)
    assert torch.equal(quantizer.codes(r), codes)
    torch.testing.assert_close(quantizer(r), (codes - zero) * step / factor_loop(case, r))
    if symmetric:
        assert bool((quantizer.zero_point == 2 ** (bits - 1)).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_soft_at_first_is_the_clipped_weight(case: str, symmetric: bool) -> None:
    quantizer, r = made(case, 3, symmetric)
    quantizer.begin_learning(Rounding.SOFT, r)
    step = quantizer.delta.view(-1, *[1] * (quantizer.weight.ndim - 1))
    zero = quantizer.zero_point.view_as(step)
    factor = factor_loop(case, r)
    scaled = torch.minimum(torch.maximum(quantizer.weight * factor, -zero * step), (7 - zero) * step)
    torch.testing.assert_close(quantizer(r), scaled / factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_integers_are_the_hard_weight_bit_for_bit(case: str, symmetric: bool) -> None:
    quantizer, r = made(case, 4, symmetric)
    with torch.no_grad():
        quantizer.v.add_(torch.randn(quantizer.v.shape))
        quantizer.scale.mul_(1.03)
    integers = CodedWeight.from_rounded(quantizer, r)
    assert integers.codes.dtype == torch.uint8
    assert integers.codes.max() <= 15
    assert torch.equal(integers(r), quantizer(r))
    ones = torch.ones_like(r)
    assert torch.equal(CodedWeight.from_rounded(quantizer, ones)(ones), quantizer(ones))


def test_rounding_moves_a_code_by_at_most_one() -> None:
    quantizer, r = made("conv")
    quantizer.v.copy_(torch.randn(quantizer.v.shape) * 5)
    scaled = quantizer.weight * r.view(1, -1, 1, 1) / quantizer.delta.view(-1, 1, 1, 1)
    codes = quantizer.codes(r) - 8
    inside = (scaled > -8) & (scaled < 7)
    assert bool(((codes - scaled).abs()[inside] <= 1).all())
    assert torch.equal((codes > scaled)[inside], (quantizer.v >= 0)[inside] & (scaled != scaled.floor())[inside])


def test_learning_round_trip() -> None:
    quantizer, r = made("conv")
    keys = set(quantizer.state_dict())
    learned = quantizer.begin_learning(Rounding.SOFT, r)
    assert set(learned) == {"v", "weight_scales"}
    assert learned["v"][0] is quantizer.v
    assert "v" in quantizer.state_dict()
    loss = (quantizer(r) - quantizer.weight * 1.1).square().sum()
    loss.backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for kind in learned.values() for p in kind)
    assert quantizer.weight.grad is None
    with torch.no_grad():
        learned["v"][0].neg_()
        learned["weight_scales"][0].fill_(0.1)
    quantizer.end_learning()
    assert quantizer.rounding is Rounding.HARD
    assert set(quantizer.state_dict()) == keys
    assert [n for n, _ in quantizer.named_parameters()] == ["weight"]
    torch.testing.assert_close(quantizer.scale, quantizer.delta * torch.tensor(0.1).exp())
    other, _ = made("conv")
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(r), quantizer(r))


def test_a_state_with_learning_under_way_is_restored() -> None:
    first, r = made("conv")
    learned = first.begin_learning(Rounding.SOFT, r)
    with torch.no_grad():
        learned["v"][0].add_(0.3)
        learned["weight_scales"][0].add_(0.2)
    second, _ = made("conv")
    second.begin_learning(Rounding.SOFT, r)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(r), first(r))


def test_nearest_passes_gradients_to_r() -> None:
    quantizer, r = made("grouped")
    quantizer.begin_learning(Rounding.NEAREST, r)
    r = r.clone().requires_grad_()
    (quantizer(r) * torch.randn(quantizer.weight.shape)).sum().backward()
    assert r.grad is not None
    assert bool(r.grad.isfinite().all())
    assert bool((r.grad != 0).any())


def test_float_is_the_weight_itself() -> None:
    quantizer, r = made("conv")
    quantizer.rounding = Rounding.FLOAT
    assert quantizer(r) is quantizer.weight


def test_weights_beyond_the_grid_keep_their_code_whatever_is_learned() -> None:
    quantizer, r = made("conv")
    with torch.no_grad():
        quantizer.delta.mul_(0.5)  # many lie outside now
        quantizer.reset_rounding(r)
        before = quantizer.codes(r)
        outside = (before == 0) | (before == 15)
        assert 0.1 < outside.float().mean() < 0.9
        quantizer.v.clamp_(-2, 2)  # as before a later round
    quantizer.begin_learning(Rounding.SOFT, r)
    fixed = quantizer.v <= -9
    assert bool(outside[fixed].all())
    quantizer(r).square().sum().backward()
    assert quantizer.v.grad is not None
    _, gradient = adaround_regularizer(quantizer.v, quantizer.v.grad, torch.tensor(2.0), torch.tensor(1.0))
    for grad in (quantizer.v.grad, gradient):
        assert not grad[fixed].any()
        assert bool(grad[~fixed].any())
    quantizer.end_learning()
    assert torch.equal(quantizer.codes(r)[fixed], before[fixed])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("shape", "conv_groups", "channels"), [((5, 6), 1, 6), ((6, 3, 3, 1), 2, 6), ((4, 7, 1, 1), 1, 1)]
)
def test_packed_weight_computes_what_the_unpacked_one_does(
    bits: int, shape: tuple[int, ...], conv_groups: int, channels: int
) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    scale, r = (0.1 + torch.rand(n, generator=generator) for n in (shape[0], channels))
    zero_point = torch.randint(0, 2**bits, (shape[0],), generator=generator).float()
    unpacked = CodedWeight(codes, scale, zero_point, make_format("int", bits), conv_groups)
    packed = PackedWeight(pack(codes, bits), shape, scale, zero_point, make_format("int", bits), conv_groups)
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed(r), unpacked(r))
    assert packed.packed.numel() == packed_size(codes.numel(), bits)
    before = packed.packed.clone()
    for o in range(shape[0]):  # an independent computation, channel by channel
        per_group = channels // conv_groups
        own = r if channels == 1 else r[(o * conv_groups // shape[0]) * per_group :][:per_group]
        factor = own.view(-1, *[1] * (len(shape) - 2))
        expected = (codes[o].double() - zero_point[o].double()) * scale[o].double() / factor.double()
        torch.testing.assert_close(packed(r)[o].double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(packed.packed, before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_settled_weight_is_the_hard_one_bit_for_bit(case: str, symmetric: bool) -> None:
    quantizer, r = made(case, 4, symmetric)
    with torch.no_grad():
        quantizer.logits.add_(torch.randn(quantizer.weight.shape))
        quantizer.scale.mul_(1.03)
    hard, codes = quantizer(r), quantizer.codes(r)
    quantizer.settle(r)
    assert "v" not in quantizer.state_dict()
    assert [t.dtype for t in quantizer.buffers() if t.shape == quantizer.weight.shape] == [torch.uint8]
    assert torch.equal(quantizer(r), hard)
    assert torch.equal(quantizer.codes(r), codes)
    assert torch.equal(CodedWeight.from_rounded(quantizer, r)(r), hard)


def test_a_settled_weight_is_opened_to_learn_again() -> None:
    quantizer, r = made("conv")
    state = {k: v.clone() for k, v in quantizer.state_dict().items()}
    hard = quantizer(r)
    quantizer.settle(r)
    quantizer.open()
    quantizer.load_state_dict(state)
    assert torch.equal(quantizer(r), hard)
    quantizer.settle(r)
    quantizer.search(r)
    assert torch.equal(quantizer.logits, state["v"])
    quantizer.settle(r)
    (v,) = quantizer.begin_learning(Rounding.SOFT, r)["v"]
    assert v.shape == quantizer.weight.shape


def test_a_weight_without_logits_rounds_like_one_whose_logits_are_0() -> None:
    quantizer, r = made("conv")
    quantizer.logits.zero_()
    codes = quantizer.codes(r)
    quantizer.discard_logits()
    assert torch.equal(quantizer.codes(r), codes)


def test_the_full_precision_weight_is_not_copied() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    quantizer = AdaRoundWeight(weight, make_format("int", 4))
    assert quantizer.weight.data_ptr() == weight.data_ptr()
    assert not quantizer.weight.requires_grad
