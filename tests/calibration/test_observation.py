"""Statistics and fits that are taken while a unit is observed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tcaq_lightning.calibration.observation import UnitObservation, observing
from tcaq_lightning.config import TrainerConfig
from tcaq_lightning.nn.parts import quantizers
from tcaq_lightning.quantizers import ActivationQuantizer, SoftmaxQuantizer
from tcaq_lightning.runtime.lightning import make_trainer


def test_every_quantizer_of_an_attention_is_observed_once(make_twins: Any) -> None:
    twins = make_twins()
    position = next(i for i, n in enumerate(twins.graph.names) if "attentions" in n)
    twins.x = torch.randn(6, *twins.x.shape[1:])
    twins.timesteps = torch.tensor([10, 10, 500, 500, 900, 900])
    streams = twins.streams()
    for earlier in range(position):
        streams.store(earlier, streams.load(earlier))
    data = streams.load(position)
    unit = twins.quantized.get_submodule(twins.graph.names[position])

    module = UnitObservation(unit, data, torch.arange(6), twins.timestep_groups, batch_size=4)
    trainer = make_trainer(TrainerConfig(accelerator="cpu"), [])
    with observing(unit, twins.timestep_groups) as observed:
        trainer.predict(module, return_predictions=False)

    found = quantizers(unit)
    assert set(observed.ranges) == {n for n, q in found.items() if isinstance(q, ActivationQuantizer)}
    assert set(observed.fits) == {n for n, q in found.items() if isinstance(q, SoftmaxQuantizer)}
    (histogram,) = observed.histograms.values()
    tokens = data.targets[0, 0].numel()
    heads = unit.heads
    assert histogram.counts.sum() == 6 * heads * tokens * tokens
    occupied = torch.bincount(data.groups, minlength=twins.timestep_groups.num_groups) > 0
    for ranges in observed.ranges.values():
        assert torch.equal(ranges.high.isfinite().all(1), occupied)
        assert (ranges.low[occupied] <= ranges.high[occupied]).all()
    assert not any(q._forward_pre_hooks for q in found.values())


def test_what_is_observed_is_what_reaches_the_quantizers(make_twins: Any) -> None:
    """Largest and smallest values by group, against a loop over captured inputs; the unit runs in full precision."""
    twins = make_twins()
    name = "mid_block.resnets.0"
    unit, data = twins.unit(name), twins.data_of(name)
    with torch.no_grad(), observing(unit, twins.timestep_groups) as observed:
        captured: dict[str, torch.Tensor] = {}
        handles = [
            q.register_forward_pre_hook(lambda _, args, n=n: captured.__setitem__(n, args[0]))
            for n, q in quantizers(unit).items()
        ]
        output = data.run(unit, twins.timestep_groups, torch.arange(len(data)), torch.device("cpu"))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(output, data.targets)
    assert observed.ranges.keys() == captured.keys()
    for quantizer, x in captured.items():
        for group in data.groups.unique().tolist():
            rows = x[data.groups == group].transpose(0, 1).flatten(1)  # (C, ...)
            assert torch.equal(observed.ranges[quantizer].low[group], rows.amin(1))
            assert torch.equal(observed.ranges[quantizer].high[group], rows.amax(1))


def test_an_error_leaves_no_hooks_behind(make_twins: Any) -> None:
    unit, timestep_groups = make_twins().unit("mid_block.resnets.0"), make_twins().timestep_groups
    with pytest.raises(RuntimeError, match="stop"), observing(unit, timestep_groups):
        raise RuntimeError("stop")
    assert not any(q._forward_pre_hooks for q in quantizers(unit).values())
    assert all(q.enabled for q in quantizers(unit).values())
