from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.config import SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation import layer_sensitivity
from tcaq_lightning.evaluation.denoiser_errors import noise_error
from tcaq_lightning.evaluation.evaluate import HELD_OUT_START
from tcaq_lightning.evaluation.layer_sensitivity import (
    FILE,
    WHOLE,
    alone,
    measure_sensitivity,
    measured_sensitivity,
    parts_of,
)
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline
from tcaq_lightning.models.sampling import LoopSampling
from tcaq_lightning.models.trajectories import collect
from tcaq_lightning.nn.parts import quant_layers

TRAJECTORIES = 2
ATTENTION = "down_blocks.0.attentions.0"


@pytest.fixture(scope="module")
def config(trained: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((trained / "manifest.json").read_text())["config"]
    return content


def models(run_dir: Path, config: dict[str, Any]) -> tuple[Any, Any, Any]:
    pipeline = open_pipeline(config["model"]["path"])
    return pipeline, find_denoiser(pipeline)[1], find_denoiser(load_quantized(run_dir / "quantized"))[1]


def on_grid(x: Tensor, step: Tensor | float, zero: Tensor | float, levels: int) -> Tensor:
    return (torch.clamp(torch.round(x / step) + zero, 0, levels) - zero) * step


def by_hand(layer: Any, x: Tensor, t: float) -> Tensor:
    """Output of a quantized layer from the tensors of the artifact, for one timestep."""
    inputs, weight = layer.input_quantizer, layer.weight_quantizer
    group = sum(t >= boundary for boundary in inputs.groups.boundaries)
    convolution = weight.codes.ndim == 4
    channels = (1, -1, 1, 1) if convolution else (-1,)
    r = inputs.r.view(1, -1, 1, 1) if convolution else inputs.r
    if inputs.shift is not None:
        x = x - inputs.shift.view(channels)
    x = on_grid(x, r * inputs.delta[group], inputs.zero_point[group], 2**inputs.bits - 1)
    rows = (-1, 1, 1, 1) if convolution else (-1, 1)
    w = (weight.codes.float() - weight.zero_point.view(rows)) * weight.scale.view(rows) / r
    return F.conv2d(x, w, layer.bias, layer.stride, layer.padding) if convolution else F.linear(x, w, layer.bias)


def error_by_hand(full: nn.Module, hooked: nn.Module, output: Any, paths: Any) -> list[float]:
    """Relative error by call where a hook replaces a module's output."""
    errors = []
    for x, t in zip(paths.inputs, paths.timesteps.tolist(), strict=True):
        target = full(x, t, return_dict=False)[0].double().numpy()
        handle = hooked.register_forward_hook(lambda _m, args, _o, t=t: output(args[0], t))
        try:
            got = full(x, t, return_dict=False)[0].double().numpy()
        finally:
            handle.remove()
        errors.append(float(((got - target) ** 2).sum() / (target**2).sum()))
    return errors


def test_errors_equal_those_of_layers_computed_by_hand(run_dir: Path, config: dict[str, Any]) -> None:
    found = measure_sensitivity(run_dir, config, TRAJECTORIES)
    pipeline, full, quantized = models(run_dir, config)
    indices = range(HELD_OUT_START, HELD_OUT_START + TRAJECTORIES)
    paths = collect(full, LoopSampling(pipeline.scheduler), SamplerConfig(num_steps=4), indices, 0, 2)
    layers = quant_layers(quantized)
    assert set(found["parts"]) == {*layers, ATTENTION, WHOLE}
    assert found["timesteps"] == paths.timesteps.tolist()
    later = [t > 0 for t in found["timesteps"]]
    assert not all(later)
    for name, layer in layers.items():
        expected = error_by_hand(full, full.get_submodule(name), lambda x, t, la=layer: by_hand(la, x, t), paths)
        part = found["parts"][name]
        assert part["relative"] == pytest.approx(expected, rel=2e-3, abs=1e-9), name
        mean = sum(e for e, counts in zip(expected, later, strict=True) if counts) / sum(later)
        assert part["summary"] == pytest.approx(mean, rel=2e-3, abs=1e-9), name
        assert part["kind"] == "layer"
    assert max(p["summary"] for p in found["parts"].values()) > 1e-6

    processor = quantized.get_submodule(ATTENTION).processor

    def attention(x: Tensor, t: float) -> Tensor:
        module: Any = full.get_submodule(ATTENTION)
        group = sum(t >= boundary for boundary in processor.query.groups.boundaries)

        def heads(values: Tensor, quantizer: Any) -> Tensor:
            values = on_grid(values, quantizer.delta[group], quantizer.zero_point[group], 2**quantizer.bits - 1)
            return values.unflatten(2, (module.heads, -1)).transpose(1, 2)

        tokens = module.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (
            heads(linear(tokens), quantizer)
            for linear, quantizer in (
                (module.to_q, processor.query),
                (module.to_k, processor.key),
                (module.to_v, processor.value),
            )
        )
        p = torch.softmax(q @ k.transpose(-1, -2) * module.scale, dim=-1)
        delta, tau, levels = (getattr(processor.probabilities, n) for n in ("delta", "tau", "bits"))
        levels = 2**levels - 1
        if tau[group] > 0:
            codes = torch.clamp(torch.round(-torch.log2(p / delta[group]) / tau[group]), 0, levels)
            p = torch.where(codes == levels, 0.0, delta[group] * 2 ** (-tau[group] * codes))
        else:
            p = on_grid(p, delta[group], 0.0, levels)
        out = module.to_out[0]((p @ v).transpose(1, 2).flatten(2))
        return (out.transpose(1, 2).unflatten(2, x.shape[2:]) + x) / module.rescale_output_factor

    expected = error_by_hand(full, full.get_submodule(ATTENTION), attention, paths)
    assert found["parts"][ATTENTION]["relative"] == pytest.approx(expected, rel=2e-3, abs=1e-9)
    assert found["parts"][ATTENTION]["kind"] == "attention"
    whole = noise_error(full, quantized, paths, 2)
    assert found["parts"][WHOLE]["relative"] == pytest.approx(whole.relative.tolist(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("fails", [False, True])
def test_both_models_are_put_back(fails: bool, run_dir: Path, config: dict[str, Any]) -> None:
    _, full, quantized = models(run_dir, config)
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(40)
    with torch.no_grad():
        before = [model(x, t).sample for model in (full, quantized)]
        for name in parts_of(quantized):
            with pytest.raises(RuntimeError) if fails else torch.no_grad(), alone(full, quantized, name):
                assert not torch.equal(full(x, t).sample, before[0]), name
                if fails:
                    raise RuntimeError
            assert torch.equal(full(x, t).sample, before[0]), name
        assert torch.equal(quantized(x, t).sample, before[1])
    assert not quant_layers(full)
    assert not full._forward_pre_hooks


def test_a_stopped_measurement_goes_on(
    run_dir: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class StoppedError(Exception):
        pass

    measured: list[str] = []
    original = layer_sensitivity.relative_error

    def counted(*args: Any) -> Any:
        measured.append("")
        return original(*args)

    monkeypatch.setattr(layer_sensitivity, "relative_error", counted)

    def stop(done: int, _total: int) -> None:
        if done == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        measure_sensitivity(run_dir, config, TRAJECTORIES, stop)
    half = measured_sensitivity(run_dir)
    assert half is not None
    assert len(half["parts"]) == len(measured) == 5

    seen: list[tuple[int, int]] = []
    complete = measure_sensitivity(run_dir, config, TRAJECTORIES, lambda done, total: seen.append((done, total)))
    total = len(complete["parts"])
    assert [done for done, _ in seen] == list(range(5, total + 1))
    assert all(b - a == 1 for a, b in pairwise(d for d, _ in seen))
    assert len(measured) == total
    assert {name: complete["parts"][name] for name in half["parts"]} == half["parts"]
    assert measure_sensitivity(run_dir, config, TRAJECTORIES) == complete
    assert len(measured) == total

    # Other settings, another artifact, or a damaged file: what is there does not count.
    assert measure_sensitivity(run_dir, config, 1) != complete
    assert len(measured) == 2 * total
    (run_dir / FILE).write_text("{")
    assert measured_sensitivity(run_dir) is None
    assert "is damaged" in caplog.text
    measure_sensitivity(run_dir, config, 1)
    (run_dir / "quantized" / "checksums.json").write_text("{}")
    assert measured_sensitivity(run_dir) is None
    assert not list(run_dir.rglob("*.tmp"))


def test_another_full_precision_model_is_refused(run_dir: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.path: expected the model that was quantized"):
        measure_sensitivity(run_dir, {**config, "model": {"path": "fashion-mnist-ddpm"}}, TRAJECTORIES)
