from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from tcaq_lightning.calibration.planning import footprint as workspace
from tcaq_lightning.calibration.planning.footprint import TrialWork, decoding_bytes, measure_footprint, unit_samples
from tcaq_lightning.config import (
    ActivationConfig,
    CalibrationConfig,
    Config,
    EvaluationConfig,
    QuantizationConfig,
    ReconstructionConfig,
    SamplerConfig,
)
from tcaq_lightning.models.denoiser_calls import Samples
from tcaq_lightning.models.graph import trace_units
from tcaq_lightning.models.pipelines import one_by_one
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.runtime.allocation_trace import TracedAllocations

CALLS = 4


def config_of(batch_size: int = 8, **reconstruction: Any) -> Config:
    return Config(
        quantization=QuantizationConfig(activation=ActivationConfig(timestep_groups=2)),
        calibration=CalibrationConfig(batch_size=batch_size, sampler=SamplerConfig(num_steps=CALLS)),
        reconstruction=ReconstructionConfig(batch_size=batch_size, **reconstruction),
        evaluation=EvaluationConfig(batch_size=batch_size),
    )


@pytest.fixture(scope="module")
def parts(make_unet: Any) -> tuple[Any, Any, Samples]:
    unet = make_unet()
    generator = torch.Generator().manual_seed(0)
    x, timesteps = torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8)
    return unet, trace_units(unet, lambda: unet(x[:2], timesteps[:2])), Samples(x, timesteps)


def test_nothing_is_changed(parts: Any) -> None:
    unet, graph, samples = parts
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    state = torch.get_rng_state()
    measure_footprint(config_of(qdrop=0.5), unet, {}, graph, samples, CALLS)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert not any(p.requires_grad for p in unet.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_nothing_is_compiled(parts: Any) -> None:
    with mock.patch.object(torch, "compile", side_effect=AssertionError):
        measure_footprint(config_of(compile=True), parts[0], {}, *parts[1:], CALLS)


def test_models_and_kinds_of_work(parts: Any) -> None:
    unet, graph, samples = parts
    footprint = measure_footprint(config_of(), unet, {}, graph, samples, CALLS)
    parameters = sum(p.nbytes for p in unet.parameters())
    assert 1.2 * parameters < footprint.models < 1.5 * parameters  # W, a byte of each code, and small tables
    assert set(footprint.workspace) == {"sampling", "search", "gate", "learn", "sensitivity"}
    small = measure_footprint(config_of(batch_size=4, weighting="uniform"), unet, {}, graph, samples, CALLS)
    assert all(small.workspace[kind] < footprint.workspace[kind] for kind in ("sampling", "gate", "learn"))
    assert set(small.workspace) == {"sampling", "search", "gate", "learn"}
    none = measure_footprint(config_of(enabled=False), unet, {}, graph, samples, CALLS)
    assert set(none.workspace) == {"sampling", "search", "gate"}


@pytest.mark.parametrize("phase", ["r", "v"])
@pytest.mark.parametrize("name", ["mid_block.resnets.0", "mid_block.attentions.0"])
def test_a_step_takes_what_is_foretold(parts: Any, phase: Any, name: str) -> None:
    unet, graph, samples = parts
    work = TrialWork(config_of(), unet, graph, samples)
    unit, data = work.twin.get_submodule(name), work.data[name]
    for layer in quant_layers(unit).values():
        layer.learned_weight.open()
    with TracedAllocations() as traced:
        work.learn(unit, data, phase)
    foretold = work.scaled(name, lambda unit, part: work.learn(unit, part, phase), len(samples))
    next_batch = sum(t.nbytes for t in (*data.inputs, data.targets))  # the step's own is read within it
    kept = 2 * sum(layer.learned_weight.weight.nbytes for layer in quant_layers(unit).values())  # V, and V before
    assert foretold >= traced.trace.peak() + next_batch + kept
    assert foretold == pytest.approx(traced.trace.peak() + next_batch + kept, rel=0.05)


@pytest.mark.parametrize("name", ["mid_block.resnets.0", "mid_block.attentions.0"])
def test_large_models_are_measured_by_their_shapes(parts: Any, name: str) -> None:
    unet, graph, samples = parts
    few = samples.cycled(3)
    config = config_of(autocast=False)  # which shapes know nothing of
    real = TrialWork(config, unet, graph, few)
    with mock.patch.object(workspace, "LARGE", 0):
        shapes = workspace._trial_work(config, unet, graph, few)
    assert next(shapes.twin.parameters()).is_meta
    assert shapes.model_bytes() == real.model_bytes()
    assert shapes.search_bytes(name, 40) == pytest.approx(real.search_bytes(name, 40), rel=0.01)
    got, expected = (work.scaled(name, work.judge, 8) for work in (shapes, real))
    assert got == pytest.approx(expected, rel=0.01)
    got, expected = (work.scaled(name, partial(work.learn, phase="v"), 8) for work in (shapes, real))
    assert got == pytest.approx(expected, rel=0.01)
    assert shapes.peak(shapes.sample, 8) == pytest.approx(real.peak(real.sample, 8), rel=0.01)


def test_a_large_model_that_looks_at_values_is_measured_where_it_is(parts: Any) -> None:
    unet, graph, samples = parts

    def look(_module: Any, args: Any) -> None:
        float(args[0].mean())

    handle = unet.conv_in.register_forward_pre_hook(look)
    with mock.patch.object(workspace, "LARGE", 0):
        work = workspace._trial_work(config_of(), unet, graph, samples.cycled(3))
    handle.remove()
    assert not next(work.twin.parameters()).is_meta


def test_units_of_equal_shape_are_measured_once(make_unet: Any, parts: Any) -> None:
    unet, graph, samples = parts
    distinct = TrialWork(config_of(), unet, graph, samples).distinct()
    assert len(distinct) < len(graph.names)
    assert set(distinct) <= set(graph.names)


def test_samples_of_units_are_their_inputs_and_outputs(parts: Any) -> None:
    unet, graph, samples = parts
    data = unit_samples(unet, graph, samples)
    assert list(data) == graph.names
    resnet = unet.get_submodule("mid_block.resnets.0")
    part = data["mid_block.resnets.0"].select(slice(3))
    batch = part.read(torch.arange(3), torch.device("cpu"))
    with torch.no_grad():
        output = resnet(*batch.args, **batch.kwargs)
    torch.testing.assert_close(output, part.targets, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def decoder() -> Any:
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(1, 1, block_out_channels=(8, 16), latent_channels=2, norm_num_groups=4, **levels).eval()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((2, 8, 8), (8, 8)), ((9, 8), (2, 18))], ids=["latents", "tokens"])
def test_decoding_takes_what_is_foretold(
    decoder: Any, large: bool, shape: tuple[int, ...], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "LARGE", 0 if large else 1 << 40)
    with TracedAllocations() as traced, torch.no_grad(), one_by_one(decoder):
        kept = decoder.decode(torch.zeros(8, 2, *size))
    assert kept.sample.shape == (8, 1, 2 * size[0], 2 * size[1])
    foretold = decoding_bytes(decoder, torch.zeros(3, *shape), 8)
    assert foretold == pytest.approx(traced.trace.peak(), rel=0.05)


def test_all_networks_of_a_pipeline_count(parts: Any, decoder: Any) -> None:
    others = {"text_encoder": nn.Linear(100, 1000), "vae": decoder}
    alone, whole = (measure_footprint(config_of(), parts[0], o, *parts[1:], CALLS) for o in ({}, others))
    assert whole.models - alone.models == sum(x.nbytes for part in others.values() for x in part.state_dict().values())
    assert whole.workspace.keys() - alone.workspace.keys() == {"decoding"}
    assert whole.workspace["decoding"] > decoding_bytes(decoder, parts[2].x, 8) > 0
