"""Quadratic DDIM against the DDIM repository's loop, and the paper's other samplers against their repositories'."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tcaq_lightning.config import SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import make_scheduler
from tcaq_lightning.models.schedulers import QuadraticDDIMScheduler
from tcaq_lightning.quantizers.timestep_groups import group_boundaries

CIFAR10 = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
LATENT: dict[str, Any] = {
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def toy_denoiser(x: Tensor, t: int) -> Tensor:
    """Smooth, not linear, different at every timestep."""
    return torch.sin(x * (1 + t / 700)) + 0.1 * x + t / 5000


def linear_alphas(start: float = 1e-4, end: float = 0.02) -> list[float]:
    """alpha-bar of T = 1000 linear betas, by a loop."""
    alphas, product = [], 1.0
    for i in range(1000):
        product *= 1 - (start + (end - start) * i / 999)
        alphas.append(product)
    return alphas


def ddim_loop(x: Tensor, sequence: list[int], first: float, alphas: list[float], eta: float, noise: Tensor) -> Tensor:
    """DDIM down an ascending sequence, whose first element leads to alpha-bar `first`; noise (S, ...) by step."""
    for step, i in enumerate(reversed(range(len(sequence)))):
        t = sequence[i]
        at, before = alphas[t], alphas[sequence[i - 1]] if i else first
        eps = toy_denoiser(x, t)
        x0 = (x - math.sqrt(1 - at) * eps) / math.sqrt(at)
        c1 = eta * math.sqrt(max(0.0, (1 - at / before) * (1 - before) / (1 - at)))
        c2 = math.sqrt(max(0.0, 1 - before - c1**2))
        x = math.sqrt(before) * x0 + c2 * eps + c1 * noise[step]
    return x


def run(scheduler: Any, x: Tensor, eta: float, noise: Tensor) -> Tensor:
    for step, t in enumerate(scheduler.timesteps):
        extra = {"eta": eta, "variance_noise": noise[step]} if isinstance(scheduler, DDIMScheduler) else {}
        x = scheduler.step(toy_denoiser(x, int(t)), t, x, **extra).prev_sample
    return x


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def repository_sequence(steps: int, total: int = 1000) -> list[int]:
    """Timesteps of the DDIM repository, which squares floats: i^2 0.8 T / (S - 1)^2 may fall just under an integer."""
    top = math.sqrt(total * 0.8)
    return [int((top / (steps - 1) * i if i < steps - 1 else top) ** 2) if steps > 1 else 0 for i in range(steps)]


@given(st.integers(1, 1000))
def test_timesteps_are_those_of_the_repository(steps: int) -> None:
    scheduler = make_scheduler(CIFAR10, SamplerConfig("QuadraticDDIMScheduler", steps))
    assert scheduler.timesteps.tolist() == repository_sequence(steps)[::-1]


def test_timesteps_of_the_papers_set_up() -> None:
    """100 steps: from 800 down to 0, of which four are 0."""
    scheduler = make_scheduler(CIFAR10, SamplerConfig("QuadraticDDIMScheduler", 100))
    timesteps = scheduler.timesteps.tolist()
    assert timesteps[:4] == [800, 783, 768, 752]
    assert timesteps[-8:] == [3, 2, 2, 1, 0, 0, 0, 0]
    assert len(timesteps) == 100
    assert len(group_boundaries(timesteps, num_groups=20)) == 19


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_quadratic_ddim_is_the_repositorys_loop(steps: int, eta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(steps, *x.shape, generator=generator, dtype=torch.float64)
    scheduler = make_scheduler(CIFAR10, SamplerConfig("QuadraticDDIMScheduler", steps))
    expected = ddim_loop(x, repository_sequence(steps), 1.0, linear_alphas(), eta, noise)
    assert distance(run(scheduler, x, eta, noise), expected) < 1e-4  # alpha-bar is stored in float32


def test_of_equal_timesteps_the_last_alone_moves_the_sample() -> None:
    scheduler = make_scheduler(CIFAR10, SamplerConfig("QuadraticDDIMScheduler", 100))
    x = torch.randn(1, 1, 4, 4)
    moved = []
    for _ in range(4):
        after = scheduler.step(toy_denoiser(x, 0), 0, x).prev_sample
        moved.append(distance(after, x) > 1e-5)
        x = after
    assert moved == [False, False, False, True]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_sample": True, "clip_sample_range": 0.7},
        {"thresholding": True, "sample_max_value": 1.5},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction", "clip_sample": True},
    ],
)
@pytest.mark.parametrize("clipped", [False, True])
def test_a_step_equals_diffusers_where_the_strides_agree(options: dict[str, Any], clipped: bool) -> None:
    quadratic = QuadraticDDIMScheduler(**{"clip_sample": False, **options})
    quadratic.set_timesteps(100)
    t, stride = 800, 800 - 783
    plain = DDIMScheduler(**{"clip_sample": False, **options})
    plain.set_timesteps(1000 // stride)
    assert 1000 // (1000 // stride) == stride
    x, prediction, noise = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    ours, theirs = (
        s.step(prediction, t, x, eta=0.6, variance_noise=noise, use_clipped_model_output=clipped)
        for s in (quadratic, plain)
    )
    torch.testing.assert_close(ours.prev_sample, theirs.prev_sample)
    torch.testing.assert_close(ours.pred_original_sample, theirs.pred_original_sample)


def test_noise_comes_from_each_samples_generator() -> None:
    scheduler = make_scheduler(CIFAR10, SamplerConfig("QuadraticDDIMScheduler", 10))
    x, eps = torch.randn(2, 2, 1, 4, 4).unbind()
    t = scheduler.timesteps[0]
    both, _ = scheduler.step(
        eps, t, x, 1.0, generator=[torch.Generator().manual_seed(i) for i in (3, 4)], return_dict=False
    )
    alone, _ = scheduler.step(eps[1:], t, x[1:], 1.0, generator=[torch.Generator().manual_seed(4)], return_dict=False)
    torch.testing.assert_close(both[1:], alone)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match=r"with 1001 steps: ValueError: num_inference_steps must be in 1\.\.1000"):
        make_scheduler(CIFAR10, SamplerConfig("QuadraticDDIMScheduler", 1001))
    with pytest.raises(UserError, match=r"one of \['QuadraticDDIMScheduler'\], got 'QuadraticScheduler'"):
        make_scheduler(CIFAR10, SamplerConfig("QuadraticScheduler", 10))
    scheduler = QuadraticDDIMScheduler()
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(torch.zeros(1), 0, torch.zeros(1))
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"one of .* got 799"):
        scheduler.step(torch.zeros(1), 799, torch.zeros(1))


def test_comes_back_from_its_files(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, norm_num_groups=2, layers_per_block=1, **blocks)
    own = QuadraticDDIMScheduler(beta_end=0.03, clip_sample=False)
    DDPMPipeline(unet, own).save_pretrained(tmp_path)
    opened = DiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert type(opened) is QuadraticDDIMScheduler
    assert dict(opened.config)["beta_end"] == 0.03
    other = make_scheduler(opened, SamplerConfig("DDPMScheduler", 5))
    assert type(other) is DDPMScheduler
    assert other.config.beta_end == 0.03
    assert type(make_scheduler(opened, SamplerConfig(num_steps=5))) is QuadraticDDIMScheduler


def latent_sequence(steps: int) -> list[int]:
    """Timesteps of latent diffusion's DDIM and PLMS samplers: every T // S-th of T, one later."""
    return [t + 1 for t in range(0, 1000, 1000 // steps)]


def latent_alphas() -> list[float]:
    alphas, product = [], 1.0
    low, high = math.sqrt(LATENT["beta_start"]), math.sqrt(LATENT["beta_end"])
    for i in range(1000):
        product *= 1 - (low + (high - low) * i / 999) ** 2
        alphas.append(product)
    return alphas


@pytest.mark.parametrize(("steps", "eta"), [(200, 1.0), (500, 0.0), (20, 0.0)])
def test_ddim_of_latent_models_is_their_repositorys(steps: int, eta: float) -> None:
    """LSUN-Bedrooms: 200 steps, eta 1. LSUN-Churches: 500, eta 0. ImageNet: 20."""
    scheduler = make_scheduler(DDIMScheduler(**LATENT), SamplerConfig("DDIMScheduler", steps, eta))
    sequence = latent_sequence(steps)
    assert scheduler.timesteps.tolist() == sequence[::-1]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(steps, *x.shape, generator=generator, dtype=torch.float64)
    alphas = latent_alphas()
    expected = ddim_loop(x, sequence, alphas[0], alphas, eta, noise)
    assert distance(run(scheduler, x, eta, noise), expected) < 1e-3  # alpha-bar is stored in float32


def test_what_the_repositories_call_400_steps_are_500() -> None:
    """400 does not divide 1000. The repositories round the stride down and run all 500; diffusers runs 400 of them."""
    assert latent_sequence(400) == latent_sequence(500)
    diffusers_400 = make_scheduler(DDIMScheduler(**LATENT), SamplerConfig("DDIMScheduler", 400))
    assert diffusers_400.timesteps.tolist() == latent_sequence(400)[:400][::-1]
    assert int(diffusers_400.timesteps[0]) == 799  # never sees the noisiest fifth
    same = make_scheduler(DDIMScheduler(**LATENT), SamplerConfig("DDIMScheduler", 500))
    assert same.timesteps.tolist() == latent_sequence(400)[::-1]


def plms_loop(x: Tensor, sequence: list[int], alphas: list[float]) -> tuple[Tensor, int]:
    """Pseudo linear multistep (Liu et al. 2022, eq. 12), begun by an improved Euler step; also the number of calls."""
    calls = 0
    earlier: list[Tensor] = []

    def step(x: Tensor, eps: Tensor, i: int) -> Tensor:
        at, before = alphas[sequence[i]], alphas[sequence[i - 1]] if i else alphas[0]
        x0 = (x - math.sqrt(1 - at) * eps) / math.sqrt(at)
        return math.sqrt(before) * x0 + math.sqrt(1 - before) * eps

    weights = {1: (3, -1), 2: (23, -16, 5), 3: (55, -59, 37, -9)}
    for i in reversed(range(len(sequence))):
        eps = toy_denoiser(x, sequence[i])
        calls += 1
        if not earlier:
            ahead = toy_denoiser(step(x, eps, i), sequence[i - 1])
            calls += 1
            used = (eps + ahead) / 2
        else:
            w = weights[len(earlier)]
            used = sum(a * e for a, e in zip(w, [eps, *reversed(earlier)], strict=True)) / sum(w)
        earlier = [*earlier, eps][-3:]
        x = step(x, used, i)
    return x, calls


def test_plms_of_stable_diffusion_is_its_repositorys() -> None:
    own = DDIMScheduler(**LATENT)
    sampler = SamplerConfig("PNDMScheduler", 50, options={"skip_prk_steps": True})
    scheduler = make_scheduler(own, sampler)
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected, calls = plms_loop(x, latent_sequence(50), latent_alphas())
    assert len(scheduler.timesteps) == calls == 51
    assert sorted(set(scheduler.timesteps.tolist())) == latent_sequence(50)
    assert distance(run(scheduler, x, 0.0, torch.zeros(51)), expected) < 1e-3  # alpha-bar is stored in float32
