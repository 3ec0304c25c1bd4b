from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from torch import Tensor

from tcaq_lightning.methods.sensitivity import normalized_weights, sampler_gain, unit_sensitivities
from tcaq_lightning.models.trajectories import Trajectories

VARIANCE = 4.0


def scheduler_of(kind: Any, steps: int = 5, **options: Any) -> Any:
    scheduler = kind(num_train_timesteps=1000, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def test_gain_equals_the_formula_and_falls_towards_the_end() -> None:
    scheduler = scheduler_of(DDIMScheduler, steps=20)
    gain = sampler_gain(scheduler, scheduler.timesteps, VARIANCE)
    sigmas = [((1 - a) / a) ** 0.5 for a in scheduler.alphas_cumprod[scheduler.timesteps].double().tolist()] + [0.0]
    expected = torch.tensor([(s - n) ** 2 * VARIANCE / (VARIANCE + n**2) for s, n in pairwise(sigmas)])
    torch.testing.assert_close(gain, (expected / expected.mean()).float())
    assert gain[0] > 3 * gain[10] > 3 * gain[-1]


def test_gain_of_a_flow_of_gaussian_data_is_what_its_sampler_does() -> None:
    """For data N(0, v) the exact eps is known: the step's error is carried to the sample as the formula says."""
    scheduler = scheduler_of(DDIMScheduler, steps=200, set_alpha_to_one=True, clip_sample=False)
    alphas = scheduler.alphas_cumprod.double()

    def run(x: Tensor, disturbed: int | None) -> Tensor:
        for call, t in enumerate(scheduler.timesteps):
            alpha = alphas[t]
            eps = x * (1 - alpha).sqrt() / (alpha * VARIANCE + 1 - alpha)
            x = scheduler.step(eps + (1e-3 if call == disturbed else 0.0), t, x).prev_sample
        return x

    start = torch.randn(4, dtype=torch.float64)
    gain = sampler_gain(scheduler, scheduler.timesteps, VARIANCE)
    chosen = (20, 100, 150)
    effects = torch.stack([(run(start, call) - run(start, None)).square().mean() for call in chosen])
    predicted = gain[list(chosen)].double()
    torch.testing.assert_close(effects / effects[0], predicted / predicted[0], rtol=0.05, atol=0)


def test_gain_follows_the_kind_of_prediction() -> None:
    eps, v, sample = (
        sampler_gain(scheduler_of(DDIMScheduler, prediction_type=kind), torch.tensor([800, 400, 0]), VARIANCE)
        for kind in ("epsilon", "v_prediction", "sample")
    )
    alpha = scheduler_of(DDIMScheduler).alphas_cumprod[[800, 400, 0]]
    torch.testing.assert_close((eps * alpha)[:2] / (eps * alpha)[0], v[:2] / v[0], rtol=1e-4, atol=0)
    ratio = eps * alpha / (1 - alpha)
    torch.testing.assert_close(ratio / ratio[0], sample / sample[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
def test_gain_is_finite_for_any_scheduler(kind: Any) -> None:
    scheduler = scheduler_of(kind)
    gain = sampler_gain(scheduler, scheduler.timesteps, VARIANCE)
    assert gain.shape == scheduler.timesteps.shape
    assert bool(gain.isfinite().all())
    assert bool((gain >= 0).all())
    assert float(gain.mean()) == pytest.approx(1, rel=1e-4)


def test_sensitivity_of_a_unit_is_its_squared_jacobian(make_twins: Any) -> None:
    """Against finite differences of every output of the last unit but one, for one sample a group."""
    twins = make_twins(attention=False, size=4)
    inputs = torch.randn(2, 1, 1, 4, 4)
    repeats = 30  # of the same calls: many signs in one pass
    timesteps = torch.tensor([900, 100])
    trajectories = Trajectories(inputs.repeat(repeats, 1, 1, 1, 1), timesteps.repeat(repeats), inputs[0])
    gain = torch.tensor([1.5, 0.5])
    averaged = unit_sensitivities(
        twins.full, twins.graph, twins.timestep_groups, trajectories, gain.repeat(repeats), 2 * repeats, 0, 8
    )["up_blocks.1.resnets.1"]
    for call, group in enumerate((1, 0)):
        x, t = inputs[call], timesteps[call]
        unit = twins.full.get_submodule("up_blocks.1.resnets.1")
        added = torch.zeros(1, 8, 4, 4)
        handle = unit.register_forward_hook(lambda _m, _a, output, added=added: output + added)
        base = twins.full(x, t).sample.double()
        expected = torch.zeros(8)
        for channel in range(8):
            for position in range(16):
                added.zero_()
                added[0, channel, position // 4, position % 4] = 1e-2
                expected[channel] += float(((twins.full(x, t).sample.double() - base) / 1e-2).square().sum()) / 16
        handle.remove()
        torch.testing.assert_close(averaged[group], gain[call] * expected, rtol=0.35, atol=0)


def test_sensitivities_cover_all_units_and_leave_the_model_alone(make_twins: Any) -> None:
    twins = make_twins()
    inputs = torch.randn(4, 3, 1, 8, 8)
    trajectories = Trajectories(inputs, torch.tensor([900, 600, 300, 0]), inputs[0])
    before = twins.full(inputs[0], 5).sample
    found = [
        unit_sensitivities(twins.full, twins.graph, twins.timestep_groups, trajectories, torch.ones(4), size, 0, 4)
        for size in (4, 4)
    ]
    assert list(found[0]) == twins.graph.names
    assert all(torch.equal(found[0][name], found[1][name]) for name in twins.graph.names)
    assert all(bool((table >= 0).all()) and bool(table.any()) for table in found[0].values())
    assert torch.equal(twins.full(inputs[0], 5).sample, before)
    assert not any(p.requires_grad or p.grad is not None for p in twins.full.parameters())
    assert all(not m._forward_hooks for m in twins.full.modules())


def test_weights_leave_the_present_error_and_fall_back_to_ones() -> None:
    weights, squares = torch.rand(3, 5), torch.rand(3, 5)
    scaled = normalized_weights(weights, squares)
    torch.testing.assert_close((scaled * squares).sum(), squares.sum())
    torch.testing.assert_close(scaled / scaled[0, 0], weights / weights[0, 0])
    assert torch.equal(normalized_weights(torch.zeros(2, 2), torch.ones(2, 2)), torch.ones(2, 2))
