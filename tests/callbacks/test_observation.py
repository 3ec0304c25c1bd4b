"""Statistics and fits that callbacks take while a unit is observed."""

from __future__ import annotations

from typing import Any

import torch

from callbacks import ActivationStatistics, DistributionFitting
from tcaq_lightning.calibration.observation import UnitObservation
from tcaq_lightning.config import TrainerConfig
from tcaq_lightning.nn.parts import quantizers
from tcaq_lightning.nn.state import full_precision
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

    module = UnitObservation(unit, data, torch.arange(6), twins.context, batch_size=4)
    trainer = make_trainer(TrainerConfig(accelerator="cpu"), [ActivationStatistics(), DistributionFitting()])
    with full_precision(unit):
        trainer.predict(module, return_predictions=False)

    found = quantizers(unit)
    assert set(module.observed.ranges) == {n for n, q in found.items() if isinstance(q, ActivationQuantizer)}
    assert set(module.observed.fits) == {n for n, q in found.items() if isinstance(q, SoftmaxQuantizer)}
    (histogram,) = module.observed.histograms.values()
    tokens = data.targets[0, 0].numel()
    heads = unit.heads
    assert histogram.counts.sum() == 6 * heads * tokens * tokens
    occupied = torch.bincount(data.groups, minlength=twins.context.num_groups) > 0
    for ranges in module.observed.ranges.values():
        assert torch.equal(ranges.high.isfinite().all(1), occupied)
        assert (ranges.low[occupied] <= ranges.high[occupied]).all()
    assert not any(q._forward_pre_hooks for q in found.values())
