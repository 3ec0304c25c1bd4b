from __future__ import annotations

import pytest
import torch

from tcaq_lightning.config import CalibrationConfig, Config, PARConfig
from tcaq_lightning.methods.par import aligned_samples, draw, mismatch, mixed
from tcaq_lightning.models.trajectories import Trajectories


def trajectories(steps: int = 3, count: int = 8, seed: int = 0) -> Trajectories:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(steps, count, 1, 2, 2, generator=generator)
    return Trajectories(inputs, torch.tensor([900, 500, 0][:steps]), torch.randn(count, 1, 2, 2, generator=generator))


@pytest.mark.parametrize(("final_share", "rounds"), [(1.0, 1), (0.5, 2), (0.01, 3)])
def test_a_round_draws_its_share_of_distinct_trajectories(final_share: float, rounds: int) -> None:
    par = PARConfig(final_share=final_share, rounds=rounds, trajectories=0.5)
    config = Config(seed=3, calibration=CalibrationConfig(num_trajectories=16), par=par)
    draws = [draw(config, m) for m in range(1, rounds + 1)]
    for m, drawn in enumerate(draws, 1):
        both = drawn.replaced.tolist() + drawn.unchanged.tolist()
        assert len(set(both)) == len(both) == 8
        assert set(both) <= set(range(16))
        assert len(drawn.replaced) == round(final_share * m / rounds * 8)
        assert torch.equal(draw(config, m).replaced, drawn.replaced)
    assert len({tuple(sorted(d.replaced.tolist() + d.unchanged.tolist())) for d in draws}) == rounds


def test_aligned_samples_are_the_redrawn_ones_then_the_unchanged_ones_then_the_judges() -> None:
    config = Config(calibration=CalibrationConfig(num_trajectories=8), par=PARConfig(final_share=0.5))
    drawn = draw(config, 1)
    full, quantized = trajectories(seed=0), trajectories(seed=1)
    judges, judges_quantized = trajectories(seed=2), trajectories(seed=3)
    got = aligned_samples(drawn, full, quantized.select(drawn.replaced), judges, judges_quantized)
    assert torch.equal(got.inputs[:, :2], quantized.inputs[:, drawn.replaced])
    assert torch.equal(got.inputs[:, 2:4], full.inputs[:, drawn.unchanged])
    from_quantized = (got.inputs[:, 4:] == judges_quantized.inputs).flatten(2).all(2).all(0)
    assert int(from_quantized.sum()) == 4
    assert torch.equal(got.inputs[:, 4:][:, ~from_quantized], judges.inputs[:, ~from_quantized])
    none = aligned_samples(drawn, full, None, judges, judges_quantized)
    assert torch.equal(none.inputs, got.inputs[:, 2:])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_mixed_replaces_whole_trajectories_by_share(share: float) -> None:
    full, quantized = trajectories(seed=0), trajectories(seed=1)
    got = mixed(full, quantized, share, seed=5)
    replaced = 0
    for i in range(8):
        source = quantized if torch.equal(got.finals[i], quantized.finals[i]) else full
        replaced += source is quantized
        assert torch.equal(got.inputs[:, i], source.inputs[:, i])
        assert torch.equal(got.finals[i], source.finals[i])
    assert replaced == round(share * 8)
    assert torch.equal(got.inputs, mixed(full, quantized, share, seed=5).inputs)


def test_mismatch_equals_a_loop() -> None:
    full, quantized = trajectories(seed=0), trajectories(seed=1)
    for step, got in enumerate(mismatch(quantized, full).tolist()):
        pairs = list(zip(quantized.inputs[step].flatten().tolist(), full.inputs[step].flatten().tolist(), strict=True))
        assert got == pytest.approx(sum((q - f) ** 2 for q, f in pairs) / sum(f**2 for _, f in pairs))
    assert mismatch(full, full).tolist() == [0, 0, 0]
