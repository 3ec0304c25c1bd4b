from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tcaq_lightning.quantizers import ActivationQuantizer, SoftmaxQuantizer, TokenQuantizer
from tcaq_lightning.quantizers.activation import along, per_sample
from tcaq_lightning.quantizers.logarithmic import log_fake_quantize
from tcaq_lightning.quantizers.observers import RangeStatistics
from tcaq_lightning.quantizers.range_search import search_affine
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, values_by_group
from tcaq_lightning.quantizers.uniform import affine_range, fake_quantize


@pytest.fixture
def groups() -> TimestepGroups:
    made = TimestepGroups([100.0, 200.0])
    made.set(torch.tensor([2, 0, 1, 0]))
    return made


def quantizer(groups: TimestepGroups, channels: int = 3, channel_dim: int = 1) -> ActivationQuantizer:
    made = ActivationQuantizer(4, groups, channels, channel_dim)
    made.delta.copy_(torch.tensor([0.1, 0.2, 0.4]))
    made.zero_point.copy_(torch.tensor([8.0, 3.0, 0.0]))
    if channels > 1:
        made.r.copy_(torch.tensor([0.5, 1.0, 2.0]))
    return made


@pytest.mark.parametrize(("shape", "channel_dim"), [((4, 3, 2, 2), 1), ((4, 5, 3), -1), ((4, 3), -1)])
def test_each_sample_takes_its_groups_parameters(
    groups: TimestepGroups, shape: tuple[int, ...], channel_dim: int
) -> None:
    q = quantizer(groups, channel_dim=channel_dim)
    x = torch.randn(shape)
    got = q(x)
    for b, g in enumerate(groups.current.tolist()):
        for c in range(3):
            part, step = x[b].select(min(0, channel_dim), c), q.delta[g] * q.r[c]
            expected = fake_quantize(part, step, -q.zero_point[g], 15 - q.zero_point[g])
            torch.testing.assert_close(got[b].select(min(0, channel_dim), c), expected)


def test_quantizing_x_is_quantizing_x_over_r_and_multiplying_back(groups: TimestepGroups) -> None:
    with_r, without = quantizer(groups), quantizer(groups, channels=1)
    x, r = torch.randn(4, 3, 6, 6), with_r.r.view(1, 3, 1, 1)
    torch.testing.assert_close(with_r(x), without(x / r) * r)


def test_learning_holds_the_geometric_mean_and_folds_into_the_buffers(groups: TimestepGroups) -> None:
    q = quantizer(groups)
    x, mean = torch.randn(4, 3, 2, 2), q.r.log().mean()
    before = q(x)
    learned = q.begin_learning(reparameterize=True)
    assert set(learned) == {"steps", "r"}
    torch.testing.assert_close(q(x), before)
    with torch.no_grad():
        learned["steps"][0].copy_(torch.tensor([0.1, -0.1, 0.3]))
        learned["r"][0].copy_(torch.tensor([1.0, 0.0, 0.5]))
    expected = q(x).detach()
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(q.scales().log().mean(), mean)
    q.end_learning()
    assert not list(q.parameters())
    assert torch.equal(q(x), expected)
    torch.testing.assert_close(q.delta, torch.tensor([0.1, 0.2, 0.4]) * torch.tensor([0.1, -0.1, 0.3]).exp())
    assert set(q.state_dict()) == {"delta", "zero_point", "r"}


def test_the_gradient_of_the_log_step_is_lsqs_times_the_step(groups: TimestepGroups) -> None:
    q = quantizer(groups, channels=1)
    x = torch.randn(4, 3, 5, 5)
    (log_delta,) = q.begin_learning(reparameterize=False)["steps"]
    q(x).sum().backward()
    assert log_delta.grad is not None
    for g in range(3):
        step = q.delta[g].clone().requires_grad_()
        fake_quantize(x[groups.current == g], step, -q.zero_point[g], 15 - q.zero_point[g]).sum().backward()
        assert step.grad is not None
        torch.testing.assert_close(log_delta.grad[g], step.grad * q.delta[g], rtol=1e-4, atol=1e-4)


def test_an_input_with_one_channel_has_no_r_to_learn(groups: TimestepGroups) -> None:
    assert set(quantizer(groups, channels=1).begin_learning(reparameterize=True)) == {"steps"}


def test_qdrop_mixes_only_while_gradients_are_taken(groups: TimestepGroups) -> None:
    q = quantizer(groups).eval()  # units are in evaluation mode during a fit
    x = torch.randn(4, 3, 16, 16)
    plain = q(x)
    q.drop_probability = 0.5
    mixed = q(x)
    kept, quantized = mixed == x, mixed == plain
    assert bool((kept | quantized).all())
    assert 0.4 < kept.float().mean() < 0.6
    with torch.no_grad():
        assert torch.equal(q(x), plain)


def test_disabled_quantizers_hand_their_input_on(groups: TimestepGroups) -> None:
    for q in (quantizer(groups), SoftmaxQuantizer(4, groups)):
        q.enabled = False
        x = torch.rand(4, 3, 2, 2)
        assert q(x) is x


def softmax(groups: TimestepGroups, tau: Tensor) -> SoftmaxQuantizer:
    made = SoftmaxQuantizer(4, groups)
    made.delta.copy_(torch.tensor([1 / 15, 0.9, 0.05]))
    made.tau.copy_(tau)
    return made


@pytest.mark.parametrize("tau", [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.5, 1.0]])
def test_softmax_takes_each_groups_kind(groups: TimestepGroups, tau: list[float]) -> None:
    q = softmax(groups, torch.tensor(tau))
    p = torch.randn(4, 2, 5, 5).softmax(-1)
    expected = []
    for b, g in enumerate(groups.current.tolist()):
        if tau[g]:
            expected.append(log_fake_quantize(p[b], q.delta[g], q.tau[g], 4))
        else:
            expected.append(fake_quantize(p[b], q.delta[g], torch.tensor(0.0), torch.tensor(15.0)))
    assert torch.equal(q(p), torch.stack(expected))


def test_softmax_of_both_kinds_without_taking_samples_apart(groups: TimestepGroups) -> None:
    q = softmax(groups, torch.tensor([0.0, 1.0, 0.0]))
    (log_delta,) = q.begin_learning()["steps"]
    p = torch.randn(4, 2, 5, 5).softmax(-1).requires_grad_()
    delta, tau = (per_sample(table, groups.current, 4) for table in (q.steps(), q.tau))
    results = []
    for quantize in (q._apart, q._both):
        quantized = quantize(p, delta, tau)
        results.append([quantized, *torch.autograd.grad(quantized.square().sum(), [p, log_delta], retain_graph=True)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("inference", [False, True])
def test_softmax_sees_every_change_of_kind(groups: TimestepGroups, inference: bool) -> None:
    with torch.inference_mode(inference):
        q = softmax(groups, torch.tensor([0.0, 1.0, 0.0]))
        assert q.logarithmic() == q.logarithmic() == (False, True, False)
        q.tau[0] = 0.5
        assert q.logarithmic() == (True, True, False)
        q.tau = torch.tensor([0.0, 0.0, 1.0])
        assert q.logarithmic() == (False, False, True)
    assert copy.deepcopy(q).logarithmic() == (False, False, True)


@pytest.mark.parametrize("group", [0, 1])
def test_softmax_with_a_single_known_group(groups: TimestepGroups, group: int) -> None:
    q = softmax(groups, torch.tensor([0.0, 1.0, 0.0]))
    p = torch.randn(4, 2, 5, 5).softmax(-1)
    groups.set(torch.full((4,), group))
    expected = q(p)
    groups.set(torch.full((4,), group), single=group)
    assert torch.equal(q(p), expected)


def test_only_uniform_groups_steps_receive_a_gradient(groups: TimestepGroups) -> None:
    q = softmax(groups, torch.tensor([0.0, 1.0, 0.0]))
    (log_delta,) = q.begin_learning()["steps"]
    q(torch.randn(4, 2, 5, 5).softmax(-1)).square().sum().backward()
    assert log_delta.grad is not None
    assert log_delta.grad[1] == 0
    assert bool((log_delta.grad[[0, 2]] != 0).all())
    delta = q.steps().detach()
    q.end_learning()
    assert torch.equal(q.delta, delta)
    assert not list(q.parameters())


def token_quantizer(groups: TimestepGroups, bits: int = 4) -> TokenQuantizer:
    made = TokenQuantizer(bits, groups, channels=6)
    made.r.copy_(torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25, 4.0]))
    made.allow_shift()
    made.shift.copy_(torch.linspace(-1, 1, 6))
    return made


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 6), (8, 6)])  # 8 rows of 4 samples too
def test_every_token_is_quantized_in_its_own_range(groups: TimestepGroups, shape: tuple[int, ...]) -> None:
    q = token_quantizer(groups)
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    got = q(x)
    for token, result in zip(x.view(-1, 6), got.view(-1, 6), strict=True):
        scaled = [(v - s) / r for v, s, r in zip(token.tolist(), q.shift.tolist(), q.r.tolist(), strict=True)]
        step, zero = affine_range(torch.tensor(min(scaled)), torch.tensor(max(scaled)), bits=4)
        codes = [min(max(round(v / step.item()) + zero.item(), 0), 15) for v in scaled]
        expected = [step.item() * (c - zero.item()) * r for c, r in zip(codes, q.r.tolist(), strict=True)]
        torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    with groups.using(torch.tensor([1])):
        assert torch.equal(q(x), got)  # whatever the timestep


def test_a_token_keeps_its_bits_in_any_company(groups: TimestepGroups) -> None:
    q, x = token_quantizer(groups), torch.randn(4, 5, 6)
    assert torch.equal(q(x)[2:3, 1:2], q(x[2:3, 1:2].contiguous()))


def test_only_r_of_dynamic_quantizers_is_learned(groups: TimestepGroups) -> None:
    q, x = token_quantizer(groups), torch.randn(4, 5, 6)
    assert q.begin_learning(reparameterize=False) == {}
    before, mean = q(x), q.r.log().mean()
    (log_r,) = q.begin_learning(reparameterize=True)["r"]
    assert torch.equal(q(x), before)
    q(x).square().sum().backward()
    assert log_r.grad is not None
    assert log_r.grad.abs().min() > 0
    with torch.no_grad():
        log_r -= 0.1 * log_r.grad
    after = q(x)
    q.end_learning()
    torch.testing.assert_close(q(x), after)
    torch.testing.assert_close(q.r.log().mean(), mean)


@pytest.mark.parametrize(("shape", "channel_dim"), [((6, 4, 3, 5), 1), ((6, 7, 4), -1), ((6, 4), -1), ((1, 9, 4), -1)])
@pytest.mark.parametrize("values", [8, 10_000])
def test_few_values_are_scaled_as_all_of_them_would_be(shape: tuple[int, ...], channel_dim: int, values: int) -> None:
    quantizer = ActivationQuantizer(4, TimestepGroups([400.0, 800.0]), 4, channel_dim)
    quantizer.r.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    x = torch.randn(shape)
    expected = x / along(quantizer.r, x.ndim, channel_dim)
    found = quantizer.scaled_by_group(x, 3, values)
    assert torch.equal(found, values_by_group(expected, 3, values))
    quantizer.allow_shift()
    assert quantizer.shift is not None
    quantizer.shift.copy_(torch.tensor([0.0, 1.0, -2.0, 0.5]))
    expected = quantizer.centred(x) / along(quantizer.r, x.ndim, channel_dim)
    found = quantizer.scaled_by_group(x, 3, values)
    assert torch.equal(found, values_by_group(expected, 3, values))


def test_each_group_gets_the_step_that_loses_least_of_its_own_values() -> None:
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    x[3:] *= 10
    ranges = RangeStatistics(2, 4)
    ranges.update(x, torch.arange(2).repeat_interleave(3), 1)
    quantizer = ActivationQuantizer(4, TimestepGroups([500.0]), 4, 1)
    quantizer.headroom = 1.25
    quantizer.search(x, ranges)
    limits = ranges.low.amin(1), ranges.high.amax(1)
    delta, zero = search_affine(x.reshape(2, -1), 4, 16, limits)
    assert torch.equal(quantizer.delta, delta * 1.25)
    assert torch.equal(quantizer.zero_point, zero)
    assert quantizer.delta[1] > 5 * quantizer.delta[0]
