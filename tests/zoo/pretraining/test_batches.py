from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.zoo.pretraining.batches import batch_indices, generator, stratified_timesteps


@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 1000))
def test_every_epoch_is_a_permutation(num_images: int, batch_size: int, seed: int) -> None:
    steps = -(-3 * num_images // batch_size)
    seen = torch.cat([batch_indices(num_images, batch_size, step, seed) for step in range(steps)])
    assert len(seen) == steps * batch_size
    for epoch in seen[: 3 * num_images].split(num_images):
        assert epoch.sort().values.tolist() == list(range(num_images))


@given(st.integers(1, 100), st.integers(1, 1000), st.integers(0, 2**31))
def test_timesteps_are_spread_evenly(batch_size: int, num_timesteps: int, seed: int) -> None:
    t = stratified_timesteps(batch_size, num_timesteps, torch.Generator().manual_seed(seed))
    assert t.shape == (batch_size,)
    assert 0 <= int(t.min()) <= int(t.max()) < num_timesteps
    counts = torch.bincount(t * batch_size // num_timesteps, minlength=batch_size)
    assert int(counts.max()) <= 2 + batch_size // num_timesteps


def test_every_timestep_is_equally_likely() -> None:
    rng = torch.Generator().manual_seed(0)
    t = torch.cat([stratified_timesteps(8, 10, rng) for _ in range(2000)])
    assert t.bincount(minlength=10).float().div(len(t)).sub(0.1).abs().max() < 0.005


def test_streams_differ() -> None:
    draws = [
        torch.rand(3, generator=generator(seed, index, stream)).tolist()
        for seed in range(2)
        for index in range(2)
        for stream in range(2)
    ]
    assert len({tuple(draw) for draw in draws}) == 8
