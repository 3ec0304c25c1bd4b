"""How often every layer runs on each calibration sample, counted from outside and held against metrics.json.

    python -m benchmarks.executions

A real calibration runs. Wrappers count the samples that pass through the full-precision layers' own `forward` (a hook
would also see a layer that a stub stands in for) and through the quantized layers' linear maps, in whatever way they
are called; none of the tool's own counters is used.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.common import SHIPPED, calibration, model_path, run, train_here
from tcaq_lightning.calibration import unit as unit_calibration
from tcaq_lightning.calibration.observation import UnitObservation
from tcaq_lightning.calibration.reconstruction import BlockReconstruction
from tcaq_lightning.calibration.streams import Streams
from tcaq_lightning.nn.layers import QuantConv2d, QuantLinear

STREAMS = ("full_stream", "quantized_stream")
COMPARED = (*STREAMS, "observe", "gate", "learn_r", "learn_v")
"""Stages held against metrics.json, whose `search` counts runs of the unit alone: the searches run single layers."""


class LayerCounter(contextlib.ExitStack):
    """While it is entered, counts on how many samples each layer runs, by stage.

    Attributes:
        counts: samples by (stage, layer name).
        samples: calibration samples of all rounds, as the streams are given them.
        names: names of the full-precision layers, by id, once the streams exist.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.samples = 0
        self.names: dict[int, str] = {}
        self._stage: str | None = None

    def __enter__(self) -> LayerCounter:
        super().__enter__()
        for full_class, quantized_class in ((nn.Conv2d, QuantConv2d), (nn.Linear, QuantLinear)):
            self._wrap(full_class, "forward", self._count_full)
            self._wrap(quantized_class, "linear_map", self._count_quantized)
        self._wrap(Streams, "__init__", self._see_streams)
        self._during(Streams, "load", lambda *_: "full_stream")
        self._during(Streams, "store", lambda *_: "quantized_stream")
        self._during(UnitObservation, "predict_step", lambda *_: "observe")
        self._during(BlockReconstruction, "training_step", lambda module, *_: f"learn_{module.phase}")
        self._during(unit_calibration, "initialize", lambda *_: "search")
        for function in ("unit_errors", "held_out_error"):
            self._during(unit_calibration, function, lambda *_: "gate")
        return self

    def _wrap(self, owner: Any, name: str, see: Callable[..., None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            see(*args)
            return result

        self.enter_context(mock.patch.object(owner, name, wrapper))

    def _during(self, owner: Any, name: str, stage: Callable[..., str]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            before, self._stage = self._stage, stage(*args)
            try:
                return original(*args, **kwargs)
            finally:
                self._stage = before

        self.enter_context(mock.patch.object(owner, name, wrapper))

    def _see_streams(self, streams: Streams, *_: Any) -> None:
        self.samples += len(streams.samples)
        self.names = {id(m): n for n, m in streams.full.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}

    def _count_full(self, layer: nn.Module, x: Tensor) -> None:
        if self._stage and id(layer) in self.names:
            self.counts[self._stage, self.names[id(layer)]] += len(x)

    def _count_quantized(self, layer: Any, x: Tensor, *_: Any) -> None:
        if self._stage and self.names:  # before the streams, the plan tries things out
            self.counts[self._stage, layer.name] += len(x)

    def by_layer(self, stage: str) -> dict[str, int]:
        """Samples by layer in one stage."""
        return {layer: count for (of, layer), count in self.counts.items() if of == stage}


def _unit_of(layer: str, units: list[str]) -> str:
    return next(unit for unit in units if layer == unit or layer.startswith(f"{unit}."))


def executions(
    model: str = SHIPPED,
    threads: int = 1,
    trajectories: int = 4,
    held_out: int = 2,
    sampler_steps: int = 5,
    iterations: int = 20,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Count the layers' executions in a calibration of two rounds.

    Args:
        model: shipped model, model of random weights, or directory.
        threads: CPU threads.
        trajectories: calibration trajectories.
        held_out: further ones.
        sampler_steps: samples of each.
        iterations: optimisation steps of a unit.
        batch_size: samples a step.
    """
    with tempfile.TemporaryDirectory() as name, LayerCounter() as counter:
        directory = Path(name)
        path = model_path(model, directory)
        run_dir = directory / "run"
        metrics = train_here(
            calibration(run_dir, path, threads, trajectories, held_out, sampler_steps, iterations, batch_size)
        )
    units = list(dict.fromkeys(record["unit"] for record in metrics["units"]))
    last = units[-1]
    stages: dict[str, dict[str, float]] = {}
    disagreeing = []
    for stage in dict.fromkeys(stage for stage, _ in counter.counts):
        counts = counter.by_layer(stage)
        per_sample = torch.tensor([counts.get(n, 0) / counter.samples for n in counter.names.values()])
        fed = [_unit_of(n, units) != last or stage != "quantized_stream" for n in counter.names.values()]
        chosen = per_sample[torch.tensor(fed)]
        stages[stage] = {"least": float(chosen.min()), "mean": float(chosen.mean()), "most": float(chosen.max())}
        if stage in COMPARED:
            said = {u: sum(r["executions"].get(stage, 0) for r in metrics["units"] if r["unit"] == u) for u in units}
            disagreeing += [f"{stage} {n}" for n, count in counts.items() if count != said[_unit_of(n, units)]]
    return {
        "model": model,
        "layers": len(counter.names),
        "samples": counter.samples,
        "rounds": len(metrics["rounds"]),
        "once_per_stream": all(stages[s]["least"] == stages[s]["most"] == 1 for s in STREAMS),
        "stored_for_nothing": sum(counter.by_layer("quantized_stream").get(n, 0) for n in _layers_of(last, counter)),
        "per_sample": stages,
        "disagreeing_with_metrics": disagreeing,
    }


def _layers_of(unit: str, counter: LayerCounter) -> list[str]:
    return [n for n in counter.names.values() if n == unit or n.startswith(f"{unit}.")]


if __name__ == "__main__":
    run(executions)
