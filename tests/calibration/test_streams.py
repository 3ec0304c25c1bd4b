from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tcaq_lightning.calibration.storage import ActivationStorage, Tier
from tcaq_lightning.calibration.streams import Streams, store_peaks
from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.models.shape_only import Absent
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.state import full_precision

CPU = torch.device("cpu")


def reference_inputs(
    model: Any, graph: Any, x: Tensor, timesteps: Tensor
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Tensor arguments and outputs of every unit in one plain forward pass of a whole denoiser."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, Tensor] = {}

    def enter(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            leaves = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.ndim]
            inputs[name] = [v.clone() for v in leaves]

        return hook

    def leave(name: str) -> Any:
        def hook(_: Any, args: Any, output: Tensor) -> Tensor:
            outputs[name] = (
                output.contiguous()
            )  # as the store lays it out: kernels may round otherwise for other strides
            return outputs[name]

        return hook

    handles = []
    for name in graph.names:
        unit = model.get_submodule(name)
        handles.append(unit.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(unit.register_forward_hook(leave(name)))
    with torch.no_grad():
        model(x, timesteps)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def by_batches(twins: Any, model: Any, batch_size: int) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """`reference_inputs` over the store's batches: kernels may round otherwise for other batch sizes."""
    parts = [
        reference_inputs(model, twins.graph, x, t)
        for x, t in zip(twins.x.split(batch_size), twins.timesteps.split(batch_size), strict=True)
    ]
    inputs = {n: [torch.cat(ts) for ts in zip(*(p[0][n] for p in parts), strict=True)] for n in twins.graph.names}
    return inputs, {n: torch.cat([p[1][n] for p in parts]) for n in twins.graph.names}


def set_quantizers(model: Any) -> None:
    for quantizer in quantizers(model).values():
        quantizer.delta.copy_(torch.tensor([0.05, 0.08]))
        if hasattr(quantizer, "zero_point"):
            quantizer.zero_point.copy_(torch.tensor([30.0, 32.0]))
    for layer in quant_layers(model).values():
        layer.learned_weight.search(layer.input_quantizer.r)
        if layer.bias_shift is not None:
            layer.bias_shift.copy_(0.01 * torch.randn_like(layer.bias_shift))


def walk(twins: Any, streams: Streams) -> dict[str, UnitData]:
    data = {}
    for position, name in enumerate(twins.graph.names):
        loaded = streams.load(position)
        data[name] = dataclasses.replace(loaded, inputs=list(loaded.inputs))  # the store takes them back
        streams.store(position, loaded)
    return data


@pytest.mark.parametrize("batch_size", [4, 10])
@pytest.mark.parametrize("quantization", [False, True])
def test_both_streams_are_bit_equal_to_plain_forward_passes(
    make_twins: Any, quantization: bool, batch_size: int
) -> None:
    twins = make_twins()
    set_quantizers(twins.quantized)
    streams = twins.streams(batch_size)  # 10 samples by 4: the last batch is smaller
    if quantization:
        data = walk(twins, streams)
        inputs, _ = by_batches(twins, twins.quantized, batch_size)
    else:
        with full_precision(twins.quantized):
            for layer in quant_layers(twins.quantized).values():
                layer.bias_shift = None
            data = walk(twins, streams)
            inputs, _ = by_batches(twins, twins.quantized, batch_size)
    plain_inputs, targets = by_batches(twins, twins.full, batch_size)
    differ = 0
    for name in twins.graph.names:
        assert torch.equal(data[name].targets, targets[name]), name
        assert len(data[name].inputs) == len(inputs[name])
        for got, expected, plain in zip(data[name].inputs, inputs[name], plain_inputs[name], strict=True):
            assert torch.equal(got, expected), name
            assert bool(got.isfinite().all())
            if not quantization:
                torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-4)
            differ += not torch.equal(got, plain)
        assert data[name].groups.tolist() == [int(t >= 500) for t in twins.timesteps]
    assert not quantization or differ > 10


def test_every_unit_runs_at_most_once_per_stream_and_sample(make_twins: Any) -> None:
    twins = make_twins()
    counts = {(kind, n): 0 for kind in ("full", "quantized") for n in twins.graph.names}

    def counted(kind: str, name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            counts[kind, name] += len(output)
            return output

        return run

    # on the class, since the store itself patches the instances' forward
    for kind in ("full", "quantized"):
        for name in twins.graph.names:
            unit = getattr(twins, kind).get_submodule(name)
            base = type(unit)
            forward = base.forward.__get__(unit)
            unit.__class__ = type(base.__name__, (base,), {"forward": staticmethod(counted(kind, name, forward))})
    walk(twins, twins.streams(4))
    last = twins.graph.names[-1]
    for (kind, name), count in counts.items():
        assert count == (0 if (kind, name) == ("quantized", last) else len(twins.x)), (kind, name)


def kinds_of_inputs(twins: Any) -> list[list[Any]]:
    inputs, _ = by_batches(twins, twins.full, len(twins.x))
    return [[(tuple(v.shape[1:]), v.dtype) for v in inputs[name]] for name in twins.graph.names]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("host", [10**9, 60_000, 0])
def test_outputs_that_nobody_needs_are_freed(make_twins: Any, tmp_path: Path, host: int, stored: torch.dtype) -> None:
    twins = make_twins()
    limits: dict[Tier, float] = {"device": 0, "host": host, "disk": 10**9}
    twins.storage = ActivationStorage(limits, CPU, tmp_path, stored)
    streams = twins.streams()
    for position in range(len(twins.graph.names)):
        streams.store(position, streams.load(position))
        alive = twins.graph.alive_after(position)
        assert set(streams._quantized) == set(streams._full) == alive
        held = [*streams._full.values(), *streams._quantized.values()]
        assert sum(v.nbytes for v in held) == sum(twins.storage.ledger.used.values())
    assert not any(twins.storage.ledger.used.values())
    peaks = store_peaks(twins.graph, kinds_of_inputs(twins), len(twins.x), torch.float32, stored, limits)
    assert peaks == twins.storage.ledger.peak
    assert (peaks["disk"] > 0) == (host < 10**9)


def test_where_it_is_stored_changes_nothing(make_twins: Any, tmp_path: Path) -> None:
    stored = []
    for host in (10**9, 60_000, 0):
        twins = make_twins()
        torch.manual_seed(0)
        set_quantizers(twins.quantized)
        twins.storage = ActivationStorage({"device": 0, "host": host, "disk": 10**9}, CPU, tmp_path)
        streams, values = twins.streams(), []
        for position in range(len(twins.graph.names)):
            data = streams.load(position)
            assert data.in_files == (host == 0) or host == 60_000
            values += [v.clone() for v in (*data.inputs, data.targets)]
            streams.store(position, data)
        stored.append(values)
    for other in stored[1:]:
        assert all(torch.equal(a, b) for a, b in zip(stored[0], other, strict=True))


def test_a_thread_reads_ahead_from_files_alone(make_twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_twins().streams().load(0)
    readers, read = [], UnitData.read

    def noting(self: UnitData, *args: Any, **kwargs: Any) -> Any:
        readers.append(threading.current_thread())
        return read(self, *args, **kwargs)

    monkeypatch.setattr(UnitData, "read", noting)
    batches = [torch.tensor([2, 0]), slice(1, 2)]
    found = {}
    for data.in_files in (False, True):
        found[data.in_files] = list(data.batches(batches, CPU))
    assert [thread is threading.main_thread() for thread in readers] == [True, True, False, False]
    for here, there in zip(found[False], found[True], strict=True):
        assert torch.equal(here.targets, there.targets)
        assert all(torch.equal(a, b) for a, b in zip(here.args, there.args, strict=True))


def test_bfloat16_rounds_what_is_stored_and_nothing_else(make_twins: Any, tmp_path: Path) -> None:
    twins, name = make_twins(), "mid_block.resnets.0"
    exact = twins.data_of(name)
    twins.storage = ActivationStorage({"device": 0, "host": 10**9, "disk": 0}, CPU, tmp_path, torch.bfloat16)
    narrow = twins.data_of(name)
    batch = narrow.read(slice(2, 5), CPU)
    assert narrow.targets.dtype == narrow.inputs[0].dtype == torch.bfloat16
    assert batch.targets.dtype == batch.args[0].dtype == torch.float32
    for got, expected in ((batch.targets, exact.targets[2:5]), (batch.args[0], exact.inputs[0][2:5])):
        assert 0 < float((got - expected).square().sum() / expected.square().sum()) < 1e-4


def test_an_output_that_was_freed_too_early_cannot_be_read(make_twins: Any) -> None:
    twins = make_twins()
    streams = twins.streams()
    for position in range(6):
        streams.store(position, streams.load(position))
    name = twins.graph.names[6]
    needed = next(iter(twins.graph.needs[name]))
    del streams._full[needed]
    with pytest.raises(KeyError, match=needed):
        streams.load(6)


def test_glue_of_what_a_unit_does_not_depend_on_computes_nothing(make_twins: Any) -> None:
    twins = make_twins()
    seen: dict[bool, int] = {True: 0, False: 0}

    def see(_module: Any, args: Any, kwargs: Any) -> None:
        for x in tree_leaves((args, kwargs)):
            seen[isinstance(x, Absent)] += isinstance(x, Tensor)

    handle = twins.full.up_blocks[0].register_forward_pre_hook(see, with_kwargs=True)
    walk(twins, twins.streams())
    handle.remove()
    assert seen[True] > 3 * seen[False] > 0


def test_glue_that_looks_at_values_is_given_some(make_twins: Any) -> None:
    twins = make_twins()
    expected = walk(twins, twins.streams())

    def look(_module: Any, _args: Any, kwargs: Any) -> None:
        for x in tree_leaves(kwargs):
            assert not isinstance(x, Tensor) or not bool(x.isinf().any())

    for model in (twins.full, twins.quantized):
        model.up_blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    found = walk(twins, twins.streams())
    for name, data in expected.items():
        tensors = zip(data.tensors(), found[name].tensors(), strict=True)
        assert all(torch.equal(x, y) for x, y in tensors), name


def test_running_a_unit_on_chosen_samples_uses_their_groups(make_twins: Any) -> None:
    twins = make_twins()
    set_quantizers(twins.quantized)
    name = "mid_block.resnets.0"
    data, unit = twins.data_of(name), twins.unit(name)
    twins.timestep_groups.set(torch.tensor([1]), single=1)
    with torch.no_grad():
        everything = data.run(unit, twins.timestep_groups, slice(0, 10), CPU)
        chosen = torch.tensor([9, 0, 0, 4])
        torch.testing.assert_close(
            data.run(unit, twins.timestep_groups, chosen, CPU), everything[chosen], rtol=1e-4, atol=1e-5
        )
    assert twins.timestep_groups.single == 1
    assert len(data) == 10


def test_denoisers_are_left_as_they_were(make_twins: Any) -> None:
    twins = make_twins()
    before = twins.full(twins.x, twins.timesteps).sample
    walk(twins, twins.streams())
    assert not any("forward" in vars(m) for model in (twins.full, twins.quantized) for m in model.modules())
    assert torch.equal(twins.full(twins.x, twins.timesteps).sample, before)
