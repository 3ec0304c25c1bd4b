"""Every family of denoisers from coverage to artifact, at the level of units."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tcaq_lightning.activations import by_sample, output_tensors
from tcaq_lightning.attention import is_attention
from tcaq_lightning.quantize import full_precision, quant_layers, uncovered
from tests.families import FAMILIES, SAMPLES, Family, make_family

CPU = torch.device("cpu")


def set_parameters(denoiser: nn.Module) -> None:
    """What a calibration would set, at random."""
    from tests.test_artifact import set_parameters as set_all

    set_all(denoiser)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any) -> Family:
    return make_family(request.param)


def test_every_layer_and_every_matmul_is_quantized_and_listed(family: Family) -> None:
    rows = {row.name: row for row in family.rows}
    assert len(rows) == len(family.rows)
    assert uncovered(family.quantized, family.rows) == []
    layers = {n for n, m in family.full.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(quant_layers(family.quantized)) == layers
    assert {rows[n].bits for n in layers} == {"W4 A8"}
    attentions = [n for n, m in family.full.named_modules() if is_attention(m)]
    assert attentions
    for name in attentions:
        assert rows[f"{name} (q k^T)"].bits == "A8 A8"
        assert rows[f"{name} (P v)"].bits == "P8 A8"
    assert sum(row.parameters for row in family.rows) == sum(p.numel() for p in family.full.parameters())


def test_every_layer_is_in_one_unit_and_every_unit_runs(family: Family) -> None:
    layers = [n for n, m in family.full.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        assert sum(layer == unit or layer.startswith(f"{unit}.") for unit in family.graph.names) == 1, layer


def test_switched_to_full_precision_it_is_the_original(family: Family) -> None:
    with full_precision(family.quantized):
        got = family.predict(family.quantized)
    expected = family.predict(family.full)
    assert float((got - expected).square().sum() / expected.square().sum()) < 1e-11


def reference(family: Family, model: Any, part: slice) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Tensor arguments and outputs of every unit in a plain forward pass, by sample."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    count = part.stop - part.start

    def enter(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            leaves = zip(tree_leaves((args, kwargs)), family.graph.rows[name], strict=True)
            inputs[name] = [by_sample(v, count).clone() for v, rows in leaves if rows]

        return hook

    def leave(name: str) -> Any:
        def hook(_: Any, args: Any, output: Any) -> Any:
            output = tree_map_only(Tensor, lambda v: v.contiguous(), output)  # as the store lays it out
            outputs[name] = [by_sample(v, count).clone() for v in output_tensors(output)]
            return output

        return hook

    handles = []
    for name in family.graph.names:
        unit = model.get_submodule(name)
        handles += [
            unit.register_forward_pre_hook(enter(name), with_kwargs=True),
            unit.register_forward_hook(leave(name)),
        ]
    family.predict(model, part)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def test_streams_give_the_inputs_and_outputs_of_plain_forward_passes(family: Family) -> None:
    set_parameters(family.quantized)
    streams = family.streams(batch_size=3)
    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    inputs = [reference(family, family.quantized, part)[0] for part in parts]
    targets = [reference(family, family.full, part)[1] for part in parts]
    for position, name in enumerate(family.graph.names):
        data = streams.load(position)
        expected = [torch.cat(xs) for xs in zip(*(p[name] for p in inputs), strict=True)]
        assert len(data.inputs) == len(expected) > 0
        for got, want in zip(data.inputs, expected, strict=True):
            assert got.isfinite().all(), name
            assert torch.equal(got, want), name
        expected = [torch.cat(xs) for xs in zip(*(p[name] for p in targets), strict=True)]
        got_targets = output_tensors(data.targets)
        assert len(got_targets) == len(expected) > 0
        assert all(torch.equal(a, b) for a, b in zip(got_targets, expected, strict=True)), name
        chosen = torch.tensor([5, 0, 2])
        with torch.no_grad():
            again = data.run(family.full.get_submodule(name), family.context, chosen, CPU)
        for a, b in zip(output_tensors(again), output_tensors(data.targets), strict=True):
            assert a.shape[1:] == b.shape[1:]
        streams.store(position, data)
    assert not any(streams.storage.ledger.used.values())
