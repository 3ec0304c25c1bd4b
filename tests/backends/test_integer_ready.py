"""Layers whose outputs are quantized: the simulation, integer arithmetic written down anew, and the engines agree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcaq_lightning.artifact.directory import freeze
from tcaq_lightning.backends.engines import open_engine
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.backends.graph.denoiser import GraphDenoiser
from tcaq_lightning.backends.graph.onnx_graph import Product, finish, trace
from tcaq_lightning.backends.graph_info import GraphInfo
from tcaq_lightning.backends.kernels import NO_CONVOLUTION, SATURATION, check_kernels
from tcaq_lightning.backends.saturation import sums_saturate
from tcaq_lightning.backends.stand_in import EngineDenoiser
from tcaq_lightning.config import ActivationConfig, LayerRule, QuantizationConfig, WeightConfig
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import output_quantizers, quant_layers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tests.backends.conftest import set_outputs, set_parameters

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
BACKENDS = ("onnxruntime", "openvino")
ROUNDING = 5e-3
"""Of a model of random ranges, as for those whose outputs stay in float (`test_engines`)."""
TIMESTEPS = torch.tensor([3.0, 30.0, 70.0, 99.0])


class OneLayer(nn.Module):
    """A denoiser of one layer, to be exported."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.config = layer, SimpleNamespace()

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.layer(sample),)


CONV: dict[str, Any] = {"kernel_size": 3, "padding": 1}
LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "by group": (lambda: nn.Conv2d(8, 12, **CONV), {}),
    "static": (lambda: nn.Conv2d(8, 12, **CONV), {"boundaries": []}),
    "8-bit weights": (lambda: nn.Conv2d(8, 12, **CONV), {"bits": 8}),
    "asymmetric weights": (lambda: nn.Conv2d(8, 12, **CONV), {"symmetric": False}),
    "zero points by group": (lambda: nn.Conv2d(8, 12, **CONV), {"activation_bits": 6}),
    "narrow, static": (lambda: nn.Conv2d(8, 12, **CONV), {"activation_bits": 4, "boundaries": []}),
    "stride, uneven padding": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=(1, 0), bias=False), {}),
    "grouped": (lambda: nn.Conv2d(8, 12, groups=2, **CONV), {}),
    "by channel": (lambda: nn.Conv2d(8, 8, groups=8, **CONV), {}),
    "pointwise, shifted": (lambda: nn.Conv2d(8, 12, 1), {}),
    "reflected": (lambda: nn.Conv2d(8, 12, padding_mode="reflect", **CONV), {}),
    "float output": (lambda: nn.Conv2d(8, 12, **CONV), {"rules": [LayerRule("layer", float_output=True)]}),
    "linear": (lambda: nn.Linear(8, 12), {}),
}


def made(name: str) -> tuple[OneLayer, QuantLayer, Tensor]:
    """A frozen denoiser of one layer with a quantized output, the layer, and inputs."""
    make, options = LAYERS[name]
    torch.manual_seed(0)
    source = make()
    holder = OneLayer(source).requires_grad_(False).eval()
    config = QuantizationConfig(
        WeightConfig(options.get("bits", 4), options.get("symmetric", True)),
        ActivationConfig(options.get("activation_bits", 8)),
        rules=options.get("rules", []),
        integer_ready=True,
    )
    quantize(holder, config, TimestepGroups(options.get("boundaries", [30.0, 60.0])))
    layer: Any = holder.layer
    if isinstance(source, nn.Linear):  # left in float by the rule for kinds of layers, not for lack of means
        layer.quantize_output()
    assert (layer.output_quantizer is None) == (name == "float output")
    set_parameters(holder)
    shape = (16, 5, 8) if isinstance(source, nn.Linear) else (16, 8, 7, 6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    set_outputs(holder, x, torch.linspace(0, 99, 16))
    freeze(holder)
    return holder, layer, 1.1 * x[:4]  # some outputs are clipped


def exported(holder: OneLayer, x: Tensor) -> tuple[bytes, list[Product]]:
    """The file's content and its products."""
    boundaries = next(iter(quant_layers(holder).values())).input_quantizer.groups.boundaries
    graph = GraphDenoiser(holder, boundaries).eval()
    model = trace(graph, {"sample": x, "timestep": TIMESTEPS})
    products = finish(model, graph, {})
    return model.SerializeToString(), products


def by_integers(layer: Any, x: Tensor) -> Tensor:
    """The layer's output from sums of integers, in float64."""
    inputs, weight, outputs = layer.input_quantizer, layer.weight_quantizer, layer.output_quantizer
    group = inputs.groups.of(TIMESTEPS)
    ones = [1] * (x.ndim - 1)
    s, z = (table.double()[group].view(-1, *ones) for table in (inputs.delta, inputs.zero_point))
    channels = [1] * x.ndim
    channels[inputs.channel_dim] = -1
    if inputs.shift is not None:
        x = x - inputs.shift.view(channels)
    # the simulation divides in float32: only so do ties round alike
    u = torch.round(x / (s.float() * inputs.r.view(channels))).double() + z
    codes = u.clamp(0, 2**inputs.bits - 1) - z
    w = weight.codes.double() - weight.zero_point.double().view(-1, *[1] * (weight.codes.ndim - 1))
    if x.ndim == 3:
        sums = codes @ w.t()
    elif layer.padding_mode == "reflect":
        sums = F.conv2d(F.pad(codes, layer._pad, mode="reflect"), w, None, layer.stride, 0, 1, layer.groups)
    else:
        sums = F.conv2d(codes, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    along = [1] * sums.ndim
    along[layer.channel_dim] = -1
    scale, delta, n = (t.double().view(along) for t in (weight.scale, outputs.delta, outputs.offset))
    e = torch.round((sums + n) * scale / delta).clamp(-128, 127)
    y = s.view(-1, *[1] * (sums.ndim - 1)) * (delta * e - scale * n)
    bias = torch.zeros(1) if layer.bias is None else layer.bias.view(along)
    shape = [4] + [1] * (sums.ndim - 1)
    shape[layer.channel_dim] = -1
    correction = torch.zeros(1) if layer.bias_shift is None else layer.bias_shift[group].view(shape)
    return y + bias + correction


def step_of(layer: Any, y: Tensor) -> Tensor:
    """Steps of the output, for each sample and channel."""
    s = layer.input_quantizer.delta[layer.input_quantizer.groups.of(TIMESTEPS)].view(-1, *[1] * (y.ndim - 1))
    along = [1] * y.ndim
    along[layer.channel_dim] = -1
    return s * layer.output_quantizer.delta.view(along)


def assert_same_codes(got: Tensor, expected: Tensor, step: Tensor) -> None:
    """Equal to float rounding, but for a few values in the middle between two codes."""
    steps = ((got.double() - expected.double()) / step).abs()
    assert bool((steps < 1.01).all())
    moved = (steps > 1e-2).double().mean()
    assert float(moved) < 2e-3, float(moved)


QUANTIZED = [name for name in LAYERS if name != "float output"]


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_simulation_is_integer_arithmetic(name: str) -> None:
    holder, layer, x = made(name)
    got = holder(x, TIMESTEPS)[0]
    expected = by_integers(layer, x)
    assert_same_codes(got, expected, step_of(layer, got))
    output: Any = layer.output_quantizer
    output.enabled = False
    plain = holder(x, TIMESTEPS)[0]
    error = float((got - plain).square().mean() / plain.var())
    assert 1e-7 < error < 3e-3  # it is quantized, and well


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_engines_compute_the_layer_on_integers(name: str, backend: str) -> None:
    holder, layer, x = made(name)
    content, products = exported(holder, x)
    assert [p.output_bits for p in products] == [8]
    engine = open_engine(backend, content, GraphInfo("", {}, products), {"threads": 1})
    expected = holder(x, TIMESTEPS)[0]
    got = torch.from_numpy(engine({"sample": x.numpy(), "timestep": TIMESTEPS.numpy()}))
    assert_same_codes(got, expected, step_of(layer, expected))
    (kernel,) = engine.kernels()
    if kernel.product.may_saturate and sums_saturate():
        assert (kernel.integer, kernel.reason) == (False, SATURATION)
        return
    assert kernel.integer, kernel
    if backend == "onnxruntime":
        assert kernel.kernel == ("QLinearConv" if x.ndim == 4 else "MatMulIntegerToFloat")
    one = engine({"sample": x[1:2].numpy(), "timestep": TIMESTEPS[1:2].numpy()})
    np.testing.assert_allclose(one, got[1:2].numpy(), rtol=1e-5, atol=1e-5)


def test_every_convolution_of_a_model_is_integer(frozen: Callable[..., Any]) -> None:
    denoiser = frozen(bits=4, integer_ready=True)
    content, info = build_graph(denoiser, "digest")
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = denoiser(x, TIMESTEPS).sample
    for backend in BACKENDS:
        engine = open_engine(backend, content, info, {"threads": 1})
        got = EngineDenoiser(engine, type(denoiser), denoiser.config)(x, TIMESTEPS).sample
        assert (got - expected).square().sum() / expected.square().sum() < ROUNDING
        kernels = engine.kernels()
        check_kernels(kernels, backend)
        convolutions = [k for k in kernels if k.product.output_bits]
        assert len(convolutions) == len(output_quantizers(denoiser)) > 8
        in_float = {k.product.name for k in kernels if not k.integer and k.reason != SATURATION}
        if backend == "openvino":
            assert not in_float
        elif sums_saturate():
            assert in_float <= {"conv_out"}
        else:
            assert in_float == {"conv_out"}  # whose output is not quantized
            assert {k.kernel for k in convolutions} == {"QLinearConv"}


@pytest.mark.parametrize(
    ("backend", "name", "reason"),
    [
        ("onnxruntime", "float output", NO_CONVOLUTION),
        ("onnxruntime", "8-bit weights", SATURATION),
        ("openvino", "8-bit weights", SATURATION),
    ],
)
def test_what_runs_in_float_says_why(backend: str, name: str, reason: str) -> None:
    holder, layer, x = made(name)
    content, products = exported(holder, x)
    engine = open_engine(backend, content, GraphInfo("", {}, products), {"threads": 1, "saturates": True})
    (kernel,) = engine.kernels()
    assert backend == "onnxruntime" or kernel.kernel.startswith("Convolution")
    assert (kernel.integer, kernel.reason) == (False, reason)
    expected = holder(x, TIMESTEPS)[0]
    got = torch.from_numpy(engine({"sample": x.numpy(), "timestep": TIMESTEPS.numpy()}))
    if layer.output_quantizer is None:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    else:
        assert_same_codes(got, expected, step_of(layer, expected))


def test_codes_around_one_zero_point_may_saturate_sooner(frozen: Callable[..., Any]) -> None:
    rules = [LayerRule("up_blocks.0.resnets.0.conv1", activation_bits=7)]
    denoiser = copy.deepcopy(frozen(bits=8, integer_ready=True, rules=rules))
    layer = denoiser.up_blocks[0].resnets[0].conv1
    layer.weight_quantizer.codes[:, :2] = 255  # 127 on both sides of a pair
    for zeros, expected in (([60.0, 60.0, 60.0], False), ([0.0, 60.0, 120.0], True)):
        layer.input_quantizer.zero_point.copy_(torch.tensor(zeros))
        _, info = build_graph(denoiser, "digest")
        assert {p.name: p.may_saturate for p in info.products}["up_blocks.0.resnets.0.conv1"] == expected
