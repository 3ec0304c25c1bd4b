from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tcaq_lightning.config import SamplerConfig
from tcaq_lightning.models.sampling import LoopSampling
from tcaq_lightning.models.trajectories import Trajectories, collect

SCHEDULERS = ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"]


@pytest.fixture(scope="module")
def unet(make_unet: Any) -> Any:
    return make_unet(attention=False)


@pytest.fixture(scope="module")
def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False)


def noise(index: int, seed: int, draws: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return [torch.randn(1, 8, 8, generator=generator) for _ in range(draws)]


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_collect_equals_a_hand_written_ddim_loop(unet: Any, scheduler: DDIMScheduler, eta: float) -> None:
    steps, seed, indices = 5, 3, [4, 0, 7]
    got = collect(unet, LoopSampling(scheduler), SamplerConfig(num_steps=steps, eta=eta), indices, seed, batch_size=2)
    alphas = scheduler.alphas_cumprod.double()
    timesteps = [800, 600, 400, 200, 0]
    assert got.timesteps.tolist() == timesteps
    draws = [noise(i, seed, steps + 1) for i in indices]
    x = torch.stack([d[0] for d in draws])
    for step, t in enumerate(timesteps):
        torch.testing.assert_close(got.inputs[step], x, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            eps = unet(x, t).sample.double()
        a, before = alphas[t], alphas[t - 200] if t >= 200 else scheduler.final_alpha_cumprod.double()
        x0 = (x.double() - (1 - a).sqrt() * eps) / a.sqrt()
        sigma = eta * ((1 - before) / (1 - a) * (1 - a / before)).sqrt()
        x = before.sqrt() * x0 + (1 - before - sigma**2).sqrt() * eps
        x = (x + sigma * torch.stack([d[step + 1] for d in draws])).float()
    torch.testing.assert_close(got.finals, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_noise_does_not_depend_on_the_batch_size(unet: Any, scheduler: Any, name: str, eta: float) -> None:
    sampler = SamplerConfig(scheduler=name, num_steps=4, eta=eta)
    one, all_at_once = (collect(unet, LoopSampling(scheduler), sampler, range(3), 1, batch_size=b) for b in (1, 3))
    assert torch.equal(one.inputs[0], all_at_once.inputs[0])
    torch.testing.assert_close(one.inputs, all_at_once.inputs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.finals, all_at_once.finals, rtol=1e-3, atol=1e-3)
    assert torch.equal(one.timesteps, all_at_once.timesteps)
    assert bool(one.finals.isfinite().all())
    other = collect(unet, LoopSampling(scheduler), sampler, range(3), 2, batch_size=3)
    assert not torch.allclose(other.inputs[0], one.inputs[0])


def test_every_step_is_one_call_and_none_is_repeated(unet: Any, scheduler: Any) -> None:
    calls: list[int] = []
    done: list[int] = []
    handle = unet.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[0]))
    got = collect(
        unet,
        LoopSampling(scheduler),
        SamplerConfig(num_steps=6),
        range(5),
        0,
        batch_size=2,
        advance=done.append,
    )
    handle.remove()
    assert calls == [2] * 6 + [2] * 6 + [1] * 6
    assert done == [2, 2, 1]
    assert (got.num_steps, got.num_trajectories) == (6, 5)


def trajectories(steps: int = 3, count: int = 8, seed: int = 0) -> Trajectories:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(steps, count, 1, 2, 2, generator=generator)
    return Trajectories(inputs, torch.tensor([900, 500, 0][:steps]), torch.randn(count, 1, 2, 2, generator=generator))


def test_flat_select_and_join() -> None:
    made = trajectories()
    x, t = made.flat().x, made.flat().timesteps
    assert t.tolist() == [900] * 8 + [500] * 8 + [0] * 8
    assert torch.equal(x[8 + 3], made.inputs[1, 3])
    parts = [made.select(slice(0, 3)), made.select(slice(3, None))]
    joined = Trajectories.join(parts)
    assert all(torch.equal(a, b) for a, b in zip(joined.packed()[0].values(), made.packed()[0].values(), strict=True))
    assert set(made.packed()[0]) == {"inputs", "timesteps", "finals"}
