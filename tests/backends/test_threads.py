"""Many threads on one denoiser: the bits of the same calls one after the other, on every backend that is installed."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from benchmarks.concurrency import compared, installed, open_denoiser
from tcaq_lightning.artifact.directory import save_artifact
from tests.backends.conftest import BOUNDARIES

BACKENDS = installed()
SCHEDULERS = (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, frozen: Callable[..., Any]) -> Path:
    """A second artifact, with other groups and weights of other bits."""
    path = tmp_path_factory.mktemp("other") / "quantized"
    denoiser = frozen(bits=6, softmax="mixed", boundaries=[BOUNDARIES[0] + 20])
    save_artifact(DDIMPipeline(denoiser, DDIMScheduler(num_train_timesteps=100)), "unet", denoiser, path, {})
    return path


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_calls(backend: str, artifact: Path) -> None:
    result = compared(open_denoiser(str(artifact), backend), calls=60, distinct=16, threads=6)
    assert (result["calls"], result["wrong"]) == (60, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pipelines_with_schedulers_of_their_own(backend: str, artifact: Path) -> None:
    unet = open_denoiser(str(artifact), backend)
    base = DDIMScheduler(num_train_timesteps=100)

    def draw(seed: int) -> Any:
        pipeline: Any = DDIMPipeline(unet, base)  # type: ignore[no-untyped-call]
        pipeline.scheduler = SCHEDULERS[seed % 3].from_config(base.config)
        pipeline.scheduler.set_timesteps(3 + seed)
        x = torch.randn(1 + seed % 3, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for t in pipeline.scheduler.timesteps:
                x = pipeline.scheduler.step(unet(pipeline.scheduler.scale_model_input(x, t), t).sample, t, x)[0]
        return x

    alone = [draw(seed) for seed in range(6)]

    async def together() -> list[Any]:
        return list(await asyncio.gather(*(asyncio.to_thread(draw, seed) for seed in range(6))))

    assert all(torch.equal(a, b) for a, b in zip(asyncio.run(together()), alone, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_artifacts_in_turn_and_copies_at_once(backend: str, artifact: Path, other: Path) -> None:
    denoisers = [open_denoiser(str(path), backend) for path in (artifact, other)]
    denoisers.append(copy.deepcopy(denoisers[0]))
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def chained(number: int) -> Tensor:
        first, second = denoisers[number % 3], denoisers[(number + 1) % 3]
        middle = first(x, torch.tensor([5 * number, 99])).sample
        result: Tensor = second.forward(middle, 7 * number, return_dict=False)[0] + first(middle, 50).sample
        return result

    alone = [chained(number) for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(chained, range(12)), alone, strict=True))


def test_one_artifact_called_within_another(artifact: Path, other: Path) -> None:
    outer, inner = open_denoiser(str(artifact), "torch"), open_denoiser(str(other), BACKENDS[-1])
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = [torch.tensor([t, 99 - t]) for t in range(0, 99, 9)]
    handle = outer.conv_in.register_forward_hook(lambda _, __, h: h + inner(x, 99).sample.mean())

    @torch.no_grad()
    def call(t: Tensor) -> Tensor:
        result: Tensor = outer(x, t).sample
        return result

    alone = [call(t) for t in steps]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(call, steps), alone, strict=True))
    handle.remove()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("openvino", "onnxruntime")])
def test_what_is_asked_beside_calls_is_made_once(backend: str, artifact: Path) -> None:
    unet = open_denoiser(str(artifact), backend)
    with ThreadPoolExecutor(6) as pool:
        assert len({id(part) for part in pool.map(lambda _: unet.conv_in, range(12))}) == 1
