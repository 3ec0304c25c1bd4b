from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tcaq_lightning.activations import Streams, UnitData, store_bytes
from tcaq_lightning.quantize import full_precision, quant_layers, quantizers

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
        data[name] = streams.load(position)
        streams.store(position, data[name])
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


def test_outputs_that_nobody_needs_are_freed(make_twins: Any) -> None:
    twins = make_twins()
    streams = twins.streams()
    largest = 0
    for position in range(len(twins.graph.names)):
        data = streams.load(position)
        held = sum(v.nbytes for store in (streams._full, streams._quantized) for v in store.values())
        largest = max(largest, held + sum(v.nbytes for v in data.inputs))
        streams.store(position, data)
        alive = twins.graph.alive_after(position)
        assert set(streams._quantized) == alive
        assert set(streams._full) == alive
    assert not streams._full
    assert not streams._quantized
    sizes = [sum(v[0].numel() for v in walk_inputs) for walk_inputs in by_batches(twins, twins.full, 10)[0].values()]
    estimate = store_bytes(twins.graph, sizes, len(twins.x))
    assert largest <= estimate <= 1.5 * largest


def test_a_freed_output_is_nan_wherever_it_is_used(make_twins: Any) -> None:
    twins = make_twins()
    streams = twins.streams()
    for position in range(6):
        streams.store(position, streams.load(position))
    name = twins.graph.names[6]
    needed = next(iter(twins.graph.needs[name]))
    del streams._full[needed]
    assert bool(streams.load(6).targets.isnan().any())


def test_running_a_unit_on_chosen_samples_uses_their_groups(make_twins: Any) -> None:
    twins = make_twins()
    set_quantizers(twins.quantized)
    name = "mid_block.resnets.0"
    data, unit = twins.data_of(name), twins.unit(name)
    twins.context.set(torch.tensor([1]), single=1)
    with torch.no_grad():
        everything = data.run(unit, twins.context, slice(0, 10), CPU)
        chosen = torch.tensor([9, 0, 0, 4])
        torch.testing.assert_close(data.run(unit, twins.context, chosen, CPU), everything[chosen], rtol=1e-4, atol=1e-5)
    assert twins.context.single == 1
    assert len(data) == 10


def test_denoisers_are_left_as_they_were(make_twins: Any) -> None:
    twins = make_twins()
    before = twins.full(twins.x, twins.timesteps).sample
    walk(twins, twins.streams())
    assert not any("forward" in vars(m) for model in (twins.full, twins.quantized) for m in model.modules())
    assert torch.equal(twins.full(twins.x, twins.timesteps).sample, before)
