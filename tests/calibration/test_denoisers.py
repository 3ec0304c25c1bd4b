"""Every family of denoisers from coverage to artifact, at the level of units."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tcaq_lightning.artifact.blobs import fuse, restore, stored_tensors
from tcaq_lightning.artifact.directory import save_artifact
from tcaq_lightning.artifact.freeze import freeze
from tcaq_lightning.artifact.structure import Structure, describe, rebuild
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.calibration.initialize import initialize
from tcaq_lightning.calibration.probes import probe_indices
from tcaq_lightning.calibration.reconstruction import BlockReconstruction
from tcaq_lightning.calibration.shards import Shard
from tcaq_lightning.calibration.storage import ActivationStorage
from tcaq_lightning.calibration.streams import Streams
from tcaq_lightning.calibration.unit_data import UnitData, split_arguments
from tcaq_lightning.calibration.unit_errors import unit_errors
from tcaq_lightning.config import (
    ActivationConfig,
    DAQConfig,
    QuantizationConfig,
    ReconstructionConfig,
    TCRConfig,
    TrainerConfig,
    WeightConfig,
)
from tcaq_lightning.methods.sensitivity import _squared_jacobians
from tcaq_lightning.models.denoiser_calls import Samples
from tcaq_lightning.models.families import is_attention
from tcaq_lightning.models.forwards import patched_forwards
from tcaq_lightning.models.graph import trace_units
from tcaq_lightning.models.unit_outputs import by_sample, channel_means, output_tensors
from tcaq_lightning.models.units import find_units
from tcaq_lightning.nn.coverage import uncovered
from tcaq_lightning.nn.layers import QuantConv2d, QuantLinear
from tcaq_lightning.nn.output_layers import output_layer
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers import TokenQuantizer
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.lightning import make_trainer
from tests.artifact.test_directory import set_parameters
from tests.families import FAMILIES, SAMPLES, W4A8, Family, make_denoiser, make_family

CPU = torch.device("cpu")


VARIANTS = ("UNet2DModel", "SDXL", "added_kv, only cross", "PixArt", "SD3.5", "Flux, no guidance")
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in FAMILIES]


@pytest.fixture(scope="module", params=NAMES)
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
    streams = family.streams(batch_size=4)  # a product's bits may depend on whether its rows begin at 16 bytes
    parts = [slice(0, 4), slice(4, 7)]
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
            again = data.run(family.full.get_submodule(name), family.timestep_groups, chosen, CPU)
        for a, b in zip(output_tensors(again), output_tensors(data.targets), strict=True):
            assert a.shape[1:] == b.shape[1:]
        streams.store(position, data)
    assert not any(streams.storage.ledger.used.values())


def test_every_layer_runs_once_a_batch_in_each_stream(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that the denoiser's own forward calls again, as a DiT's calls the embedding of its first block."""
    set_parameters(family.quantized)
    runs: Counter[int] = Counter()

    def count(kind: Any, method: str) -> None:
        original = getattr(kind, method)

        def counted(layer: Any, *args: Any) -> Any:
            runs[id(layer)] += 1
            return original(layer, *args)

        monkeypatch.setattr(kind, method, counted)

    for kind, method in ((nn.Linear, "forward"), (nn.Conv2d, "forward")):
        count(kind, method)
    for kind in (QuantLinear, QuantConv2d):
        count(kind, "linear_map")
    streams = family.streams(batch_size=4)
    for position in range(len(family.graph.names)):
        streams.store(position, streams.load(position))
    full = {n: m for n, m in family.full.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    last = family.graph.names[-1]
    assert {name: runs[id(layer)] for name, layer in full.items()} == dict.fromkeys(full, 2)
    for name, layer in quant_layers(family.quantized).items():
        assert runs[id(layer)] == (0 if name == last or name.startswith(f"{last}.") else 2), name
    if isinstance(family.full, DiTTransformer2DModel):
        assert family.graph.echoes == {"transformer_blocks.0": {"transformer_blocks.0.norm1.emb": (16,)}}
    else:
        assert family.graph.echoes == {}
    assert not any(streams.storage.ledger.used.values())


def initialize_unit(family: Family, name: str, observe: Any) -> tuple[nn.Module, UnitData]:
    """A quantized unit, its quantizers set from its inputs, everything before it in full precision."""
    unit: nn.Module = family.quantized.get_submodule(name)
    data = data_of(family, name)
    probes = data.select(probe_indices(data.groups, family.timestep_groups.num_groups, 40))
    initialize(
        unit, probes, family.timestep_groups, observe(unit, data, family.timestep_groups), TCRConfig(), DAQConfig(), CPU
    )
    return unit, data


def data_of(family: Family, name: str) -> UnitData:
    streams = family.streams(batch_size=SAMPLES)
    with full_precision(family.quantized):
        for position, unit in enumerate(family.graph.names):
            data = streams.load(position)
            if unit == name:
                return data
            streams.store(position, data)
    raise KeyError(name)


LEARNED = {
    "Stable Diffusion 1": ("mid_block.resnets.0", "mid_block.attentions.0.transformer_blocks.0", "time_embedding"),
    "SDXL": ("add_embedding",),
    "added_kv": ("mid_block.attentions.0",),
    "DiT": ("transformer_blocks.1", "proj_out_1"),
    "PixArt, sizes": ("transformer_blocks.1", "adaln_single.emb.resolution_embedder"),
    "SD3.5": ("transformer_blocks.0", "transformer_blocks.2", "time_text_embed.text_embedder"),
    "Flux": ("transformer_blocks.1", "single_transformer_blocks.0"),
}
"""Units of every kind: residual, transformer, joint (the last one with one output), embeddings with several rows."""


FAST = ("mid_block.resnets.0", "single_transformer_blocks.0", "adaln_single.emb.resolution_embedder")


@pytest.mark.parametrize(
    ("name", "unit_name"),
    [pytest.param(f, u, marks=() if u in FAST else pytest.mark.slow) for f, units in LEARNED.items() for u in units],
)
def test_reconstruction_lowers_the_error_of_all_outputs(name: str, unit_name: str, observe: Any) -> None:
    config = dataclasses.replace(W4A8, weight=WeightConfig(bits=3))
    family = make_family(name, config)
    unit, data = initialize_unit(family, unit_name, observe)
    samples, arguments = torch.arange(SAMPLES), (family.timestep_groups, 3, CPU)
    nearest = unit_errors(unit, data, samples, *arguments).squares
    outputs = output_tensors(data.targets)
    assert nearest.shape == (2, sum(channel_means(x).shape[1] for x in outputs))
    data.weights = torch.ones_like(nearest)
    settings = ReconstructionConfig(batch_size=4)
    for phase, steps in (("r", 8), ("v", 150)):
        module = BlockReconstruction(unit, data, samples, family.timestep_groups, settings, phase, steps, (0, 0, 1))  # type: ignore[arg-type]
        make_trainer(TrainerConfig(accelerator="cpu"), [], None, steps).fit(module)
        module.finish()
    learned = unit_errors(unit, data, samples, *arguments).squares
    assert learned.sum() < 0.9 * nearest.sum()
    with torch.no_grad():
        got = output_tensors(data.run(unit, family.timestep_groups, samples, CPU))
    by_hand = sum(
        (a - b).square().movedim(1 if a.ndim == 4 else -1, -1).sum(-1).mean() for a, b in zip(got, outputs, strict=True)
    )
    torch.testing.assert_close(learned.sum(), torch.as_tensor(by_hand), rtol=1e-4, atol=0)
    for x in outputs:  # no output is left out of the sum
        assert float(x.square().sum()) > 0


def test_sensitivities_are_those_of_finite_differences_for_every_output() -> None:
    family = make_family("SD3")
    gradients = _squared_jacobians  # of one sign vector, by unit, the outputs' channels in sequence
    x, t = family.x[:1], family.timesteps[:1]
    signs = torch.ones_like(x, dtype=torch.long)

    class Bound(nn.Module):
        """Calls the denoiser with all its arguments."""

        def __init__(self) -> None:
            super().__init__()
            self.denoiser = family.full

        def forward(self, _x: Tensor, timestep: Tensor, return_dict: bool = False) -> Any:
            args, kwargs = family.arguments(slice(0, 1))
            return self.denoiser(*args, **kwargs)

    graph = dataclasses.replace(
        family.graph,
        names=[f"denoiser.{n}" for n in family.graph.names],
        needs={},
        output_shapes={f"denoiser.{k}": v for k, v in family.graph.output_shapes.items()},
        outputs={
            f"denoiser.{n}": dataclasses.replace(t, keys=tuple(k and f"denoiser.{k}" for k in t.keys))
            for n, t in family.graph.outputs.items()
        },
    )
    name = "transformer_blocks.0"
    got = gradients(Bound(), graph, Samples(x, t), signs)[f"denoiser.{name}"][0]  # (2 * 16,)
    block = family.full.get_submodule(name)
    forward, step = block.forward, 1e-2

    def moved(number: int, token: int, channel: int, by: float) -> float:
        def shifted(*args: Any, **kwargs: Any) -> Any:
            outputs = [x.clone() for x in forward(*args, **kwargs)]
            outputs[number][0, token, channel] += by
            return tuple(outputs)

        with patched_forwards(family.full, {name: shifted}):
            return float(family.predict(family.full, slice(0, 1)).double().sum())

    for number, channel, tokens in ((0, 3, 5), (1, 7, 16)):
        slopes = [
            (moved(number, i, channel, step) - moved(number, i, channel, -step)) / 2 / step for i in range(tokens)
        ]
        expected = sum(s * s for s in slopes) / tokens
        assert float(got[16 * number + channel]) == pytest.approx(expected, rel=2e-2)


def round_trip(family: Family, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The frozen twin, taken apart and built again from the full-precision architecture."""
    freeze(family.quantized)
    structure = describe(family.quantized)
    copied = Structure.from_dict(json.loads(json.dumps(structure.to_dict())))
    assert copied == structure
    blobs = fuse(stored_tensors(family.quantized))
    fresh = make_denoiser(name)  # float32, as diffusers builds it from a config
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(torch.nan)
    rebuild(fresh, copied)
    restore(stored_tensors(fresh), blobs)
    return fresh


@pytest.mark.parametrize("name", NAMES)
def test_a_reloaded_denoiser_computes_the_same_bits(name: str) -> None:
    family = make_family(name)
    set_parameters(family.quantized)
    fresh = round_trip(family, name)
    expected = family.predict(family.quantized)
    assert expected.isfinite().all()
    assert torch.equal(family.predict(fresh), expected)


def fuse_projections(denoiser: Any) -> None:
    denoiser.fuse_qkv_projections()
    for module in denoiser.modules():  # what counts is what the fused layers hold
        for fused in ("to_qkv", "to_kv", "to_added_qkv"):
            if hasattr(module, fused):
                getattr(module, fused).weight.data *= 1.05


@pytest.mark.parametrize("name", ["Stable Diffusion 1", "PixArt", "SD3", "Flux"])
def test_fused_projections_are_taken_apart(name: str) -> None:
    family = make_family(name, prepare=fuse_projections)
    expected = family.predict(family.full)
    unfused = make_family(name)
    assert not torch.allclose(expected, unfused.predict(unfused.full), atol=1e-3)
    with full_precision(family.quantized):
        got = family.predict(family.quantized)
    assert float((got - expected).square().sum() / expected.square().sum()) < 1e-11
    assert set(quant_layers(family.quantized)) == set(quant_layers(unfused.quantized))
    rows = {row.name: row for row in family.rows}
    fused = [n for n, m in family.full.named_modules() if n.endswith(("to_qkv", "to_kv", "to_added_qkv"))]
    assert fused
    assert all(rows[n].note == "fused projections, taken apart" for n in fused)
    assert sum(row.parameters for row in family.rows) == sum(p.numel() for p in family.full.parameters())
    set_parameters(family.quantized)
    assert torch.equal(family.predict(family.quantized), family.predict(round_trip(family, name)))


def test_small_gradients_of_float16_are_not_lost(observe: Any) -> None:
    family = make_family("Stable Diffusion 1", dtype=torch.float16)
    unit, data = initialize_unit(family, "mid_block.attentions.0.transformer_blocks.0", observe)
    gradients = []
    for weight in (1.0, 2.0**-20):  # errors of a well trained model are small, and tokens are many
        data.weights = torch.full((2, data.channels), weight)
        settings = ReconstructionConfig(batch_size=4)
        module = BlockReconstruction(
            unit, data, torch.arange(SAMPLES), family.timestep_groups, settings, "v", 9, (0, 0, 1)
        )
        module._batches = data.batches([torch.arange(SAMPLES)], CPU)
        module.configure_optimizers()
        module.training_step(0, 0).backward()  # type: ignore[no-untyped-call]
        module.on_after_backward()
        found = [p.grad.flatten() / weight for p in module.learned["v"] if p.grad is not None]
        assert len(found) == len(quant_layers(unit))
        gradients.append(torch.cat(found))
        module.finish()
    assert gradients[0].any()
    assert float((gradients[1] - gradients[0]).square().sum() / gradients[0].square().sum()) < 1e-5


NARROW = [
    ("UNet2DModel", "mid_block.attentions.0", torch.bfloat16),
    ("Flux", "single_transformer_blocks.1", torch.float16),
    ("UNet2DModel", "mid_block.attentions.0", torch.float16),
    ("SDXL", "mid_block.attentions.0.transformer_blocks.0", torch.float16),
    ("SDXL", "mid_block.attentions.0.transformer_blocks.0", torch.bfloat16),
    ("SD3", "transformer_blocks.1", torch.bfloat16),
    ("Flux", "single_transformer_blocks.1", torch.bfloat16),
]


@pytest.mark.parametrize(
    ("name", "unit_name", "dtype"),
    [pytest.param(*case, marks=() if i < 1 else pytest.mark.slow) for i, case in enumerate(NARROW)],
)
def test_narrow_checkpoints(name: str, unit_name: str, dtype: torch.dtype, observe: Any) -> None:
    family = make_family(name, dtype=dtype)
    prediction = family.predict(family.full)
    assert prediction.dtype == dtype
    with full_precision(family.quantized):
        got = family.predict(family.quantized)
    scale = prediction.float().square().sum()
    assert got.dtype == dtype
    assert float((got.float() - prediction.float()).square().sum() / scale) < (
        1e-3 if dtype is torch.bfloat16 else 1e-5
    )

    unit, data = initialize_unit(family, unit_name, observe)
    for layer in quant_layers(unit).values():
        assert layer.learned_weight.weight.dtype == dtype  # no copy that takes more memory
        assert layer.learned_weight.logits.dtype == layer.learned_weight.delta.dtype == torch.float32
    assert all(q.delta.dtype == torch.float32 for q in quantizers(unit).values())
    batch = data.read(slice(0, 2), CPU)
    assert {x.dtype for x in tree_leaves(batch.targets) if isinstance(x, Tensor)} == {torch.float32}
    inputs = [x for x in tree_leaves((batch.args, batch.kwargs)) if isinstance(x, Tensor) and x.ndim > 2]
    assert {x.dtype for x in inputs} == {dtype}
    samples = torch.arange(SAMPLES)
    before = unit_errors(unit, data, samples, family.timestep_groups, 4, CPU).squares.sum()
    settings = ReconstructionConfig(batch_size=4)
    module = BlockReconstruction(unit, data, samples, family.timestep_groups, settings, "v", 120, (0, 0, 1))
    make_trainer(TrainerConfig(accelerator="cpu"), [], None, 120).fit(module)
    module.finish()
    assert unit_errors(unit, data, samples, family.timestep_groups, 4, CPU).squares.sum() < before

    set_parameters(family.quantized)
    unfrozen = family.predict(family.quantized)
    fresh = round_trip(family, name)
    assert fresh.dtype == family.quantized.dtype == dtype
    expected = family.predict(family.quantized)
    assert expected.dtype == dtype
    assert torch.equal(expected, unfrozen)
    assert expected.isfinite().all()
    assert torch.equal(family.predict(fresh), expected)


DYNAMIC = dataclasses.replace(W4A8, activation=ActivationConfig(bits=4, dynamic_per_token=True))


@pytest.mark.parametrize("name", ["Stable Diffusion 1", "DiT", "Flux"])
def test_dynamic_tokens_are_for_linear_layers_alone(name: str) -> None:
    family = make_family(name, DYNAMIC)
    rows = {row.name: row for row in family.rows}
    for layer_name, layer in quant_layers(family.quantized).items():
        linear = isinstance(family.full.get_submodule(layer_name), nn.Linear)
        assert isinstance(layer.input_quantizer, TokenQuantizer) == linear
        assert (rows[layer_name].bits, rows[layer_name].note) == ("W4 A4", "dynamic per token" if linear else "")
    operands = [q for n, q in quantizers(family.quantized).items() if ".processor." in n]
    assert operands
    assert not any(isinstance(q, TokenQuantizer) for q in operands)

    set_parameters(family.quantized)
    expected = family.predict(family.quantized)
    fresh = round_trip(family, name)
    entries = describe(family.quantized).layers
    assert {n for n, e in entries.items() if e.dynamic} == {
        n for n, row in rows.items() if row.note == "dynamic per token"
    }
    keys = [stored.key for stored in stored_tensors(family.quantized)]
    unused = [k for k in keys if k.endswith(("input_quantizer.delta", "input_quantizer.zero_point"))]
    assert not [k for k in unused if entries[k.rpartition(".input")[0]].dynamic]  # there is nothing to store
    assert expected.isfinite().all()
    assert torch.equal(family.predict(fresh), expected)


def test_dynamic_tokens_are_calibrated_and_nearer_than_static_ones(observe: Any) -> None:
    errors, name = [], "transformer_blocks.1"
    for dynamic in (False, True):
        activation = ActivationConfig(bits=4, dynamic_per_token=dynamic)
        family = make_family("DiT", QuantizationConfig(weight=WeightConfig(bits=8), activation=activation))
        unit, data = initialize_unit(family, name, observe)
        errors.append(
            float(unit_errors(unit, data, torch.arange(SAMPLES), family.timestep_groups, 4, CPU).squares.sum())
        )
    settings = ReconstructionConfig(batch_size=4)
    for phase in ("r", "v"):
        module = BlockReconstruction(
            unit, data, torch.arange(SAMPLES), family.timestep_groups, settings, phase, 5, (0, 0, 1)
        )  # type: ignore[arg-type]
        make_trainer(TrainerConfig(accelerator="cpu"), [], None, 5).fit(module)
        module.finish()
    assert errors[1] < 0.8 * errors[0]


class Call(nn.Module):
    """A denoiser that is not in any registry, called with x and t alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.denoiser = AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pos_embed_max_size=16,
        )
        self.text = torch.randn(1, 5, 12)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        text = self.text.expand(len(sample), -1, -1)
        return self.denoiser(sample, text, timestep=timestep / 1000, return_dict=False)


def test_a_denoiser_that_is_not_in_the_registry_works_by_the_general_rule() -> None:
    full = Call().requires_grad_(False).eval()
    quantized, timestep_groups = copy.deepcopy(full), TimestepGroups([500.0])
    rows = {row.name: row for row in quantize(quantized, W4A8, timestep_groups)}
    layers = {n for n, m in full.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(quant_layers(quantized)) == layers == {n for n, row in rows.items() if row.bits == "W4 A8"}
    attentions = [n for n, m in full.named_modules() if is_attention(m)]
    assert len(attentions) == 2
    for name in attentions:
        assert rows[f"{name} (P v)"].bits == "P8 A8"
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in full.parameters())

    x, t = torch.randn(SAMPLES, 4, 8, 8), torch.arange(0, 700, 100)
    graph = trace_units(full, lambda: full(x[:2], t[:2]))
    assert set(attentions) < set(graph.names)
    joint = "denoiser.joint_transformer_blocks.0.attn"
    assert graph.keys(joint) == [joint, f"{joint}#1"]  # it returns two streams
    storage = ActivationStorage({"device": 0, "host": 1e9, "disk": 0}, CPU, Path())
    streams, outputs = Streams(full, quantized, graph, timestep_groups, Samples(x, t), 3, storage), []
    with full_precision(quantized):
        for position in range(len(graph.names)):
            data = streams.load(position)
            assert all(stored.isfinite().all() for stored in data.tensors())
            outputs.append(data.targets.clone() if isinstance(data.targets, Tensor) else None)
            streams.store(position, data)
    seen: list[Tensor] = []
    full.get_submodule(graph.names[-1]).register_forward_hook(lambda _m, _a, output: seen.append(output))
    full(x, t)
    torch.testing.assert_close(outputs[-1], seen[0], rtol=1e-4, atol=1e-5)


class Repeated(nn.Module):
    """A denoiser of blocks that it names itself."""

    _repeated_blocks: ClassVar[list[str]] = ["Step"]

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([Step(), Step()])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for step in self.steps:
            sample = step(sample)
        return sample


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.linear(x)
        return y


def test_blocks_that_a_denoiser_names_are_units() -> None:
    model = Repeated()
    assert find_units(model) == ["steps.0", "steps.1"]
    assert output_layer(model.steps[0], "steps.0") is None
    graph = trace_units(model, lambda: model(torch.randn(4, 3, 4), torch.zeros(4)))
    assert graph.needs["steps.1"] == {"steps.0"}
    assert graph.rows == {"steps.0": (1,), "steps.1": (1,)}


def test_parts_and_shards_of_units_with_several_outputs() -> None:
    family = make_family("SD3")
    data = data_of(family, "transformer_blocks.0")
    first, second = data.targets
    part = data.select(slice(3))
    assert [x.shape[0] for x in part.tensors()] == [3] * len(data.tensors())
    assert len(part) == 3
    shard = Shard.deal(data.groups, learned=1, held_out=0)
    numbers = torch.tensor([4, 0, 5])
    collected = shard.collected(data, numbers)
    assert torch.equal(collected.targets[0], first[numbers])
    assert torch.equal(collected.targets[1], second[numbers])
    last = data_of(family, "transformer_blocks.2")  # its context ends there
    assert last.targets[0] is None
    assert isinstance(last.targets[1], Tensor)


def test_arguments_that_agree_with_the_batch_size_by_chance_are_told_apart() -> None:
    family = make_family("Flux")
    name = "single_transformer_blocks.0"
    tokens = 5 + 12
    rows = family.graph.rows[name]
    assert sorted(rows) == [0, 0, 0, 1, 1, 1]  # keyword arguments and the pair of rotations are none of the samples'
    arguments = ((), {"a": torch.zeros(tokens, 2, 3), "b": torch.zeros(tokens, 8), "c": torch.zeros(2 * tokens)})
    split = split_arguments(arguments, tokens, (1, 0, 2))
    assert [tuple(x.shape) for x in split.inputs] == [(tokens, 2, 3), (tokens, 2)]
    assert list(split.constants) == [1]
    assert split.folded == {1}
    assert len(split_arguments(arguments, tokens).inputs) == 2  # without knowing better


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_an_artifact_opens_in_the_types_that_it_was_made_of(tmp_path: Path, dtype: torch.dtype) -> None:
    family = make_family("DiT", dtype=dtype)
    set_parameters(family.quantized)
    freeze(family.quantized)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).to(dtype)
    pipeline = DiTPipeline(family.full, vae, DDIMScheduler())
    save_artifact(pipeline, "transformer", family.quantized, tmp_path / "quantized", {})
    loaded: Any = load_quantized(tmp_path / "quantized", packed=False)
    assert loaded.transformer.dtype == loaded.vae.dtype == dtype
    types = {n: t.dtype for n, t in family.quantized.state_dict().items()}
    assert {n: t.dtype for n, t in loaded.transformer.state_dict().items()} == types
    assert torch.equal(family.predict(loaded.transformer), family.predict(family.quantized))
    pixels, latents = (torch.zeros(1, c, 8, 8, dtype=dtype) for c in (3, 4))
    assert torch.equal(loaded.vae.decode(latents).sample, vae.eval().decode(latents).sample)
    assert loaded.vae.encode(pixels).latent_dist.mean.dtype == dtype


def test_a_module_in_another_type_keeps_it() -> None:
    family = make_family("PixArt", dtype=torch.bfloat16)
    for denoiser in (family.full, family.quantized):  # such as diffusers keeps in float32
        denoiser.scale_shift_table.data = denoiser.scale_shift_table.data.float()
    set_parameters(family.quantized)
    expected = family.predict(family.quantized)
    fresh = round_trip(family, "PixArt")
    assert describe(family.quantized).dtypes == {"": "bfloat16", "scale_shift_table": "float32"}
    assert fresh.scale_shift_table.dtype == torch.float32
    assert torch.equal(family.predict(fresh), expected)
