from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tcaq_lightning.backends.engines import open_engine
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.backends.graph_info import GraphInfo
from tcaq_lightning.backends.kernels import NO_CONVOLUTION, SATURATION, check_kernels
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.backends.saturation import sums_saturate
from tcaq_lightning.backends.stand_in import EngineDenoiser
from tcaq_lightning.config import LayerRule, SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import sample

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
BACKENDS = ("openvino", "onnxruntime")
ROUNDING = 5e-3
"""Of a model of random ranges: a value that an engine's float sums move over the middle between two codes moves the
values behind it by whole steps."""


def inputs(batch: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([3, 30, 70, 99])[:batch]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).square().sum() / expected.square().sum())


GRAPHS: dict[int, tuple[Any, bytes, GraphInfo]] = {}  # by denoiser, which is kept: building takes seconds


def engine_of(backend: str, denoiser: Any, **options: Any) -> EngineDenoiser:
    if id(denoiser) not in GRAPHS:
        GRAPHS[id(denoiser)] = (denoiser, *build_graph(denoiser, "digest"))
    _, content, info = GRAPHS[id(denoiser)]
    engine = open_engine(backend, content, info, {"threads": 1, **options})
    return EngineDenoiser(engine, type(denoiser), denoiser.config)


@pytest.mark.parametrize("backend", BACKENDS)
def test_asymmetric_codes_below_four_signed_bits_are_stored_in_eight(backend: str, frozen: Callable[..., Any]) -> None:
    denoiser = copy.deepcopy(frozen(bits=4, symmetric=False))
    weight = denoiser.conv_out.weight_quantizer  # of a single output channel
    weight.zero_point.fill_(13.0)
    assert int(weight.codes.min()) < 5
    content, info = build_graph(denoiser, "digest")
    stand_in = EngineDenoiser(open_engine(backend, content, info, {"threads": 1}), type(denoiser), denoiser.config)
    x, t = inputs(2)
    assert relative_error(stand_in(x, t).sample, denoiser(x, t).sample) < ROUNDING
    assert {p.name: p.stored for p in info.products}["conv_out"] == "int8"


@pytest.mark.parametrize(
    "case",
    [
        {"bits": 4, "levels": 2},
        pytest.param({"bits": 8, "boundaries": []}, marks=pytest.mark.slow),
        {"bits": 6, "softmax": "mixed", "rules": [LayerRule("*", activation_bits=6, softmax_bits=4)]},
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_engines_compute_the_simulated_model_on_integers(
    backend: str, case: dict[str, Any], frozen: Callable[..., Any]
) -> None:
    denoiser = frozen(**case)
    stand_in = engine_of(backend, denoiser)
    for batch in (4, 1):
        x, t = inputs(batch)
        assert relative_error(stand_in(x, t).sample, denoiser(x, t).sample) < ROUNDING
    kernels = stand_in.engine.kernels()
    check_kernels(kernels, backend)
    in_float = {(k.product.operator, k.reason) for k in kernels if not k.integer}
    expected = {("Conv", NO_CONVOLUTION)} if backend == "onnxruntime" else set()
    if case.get("softmax") == "mixed":
        expected |= {("MatMul", "logarithmic codes of the probabilities: no integer kernel takes them")}
    if sums_saturate():
        assert in_float <= expected | {("MatMul", SATURATION), ("Conv", SATURATION)}
        kept = {k.product.name for k in kernels if k.reason == SATURATION}
        assert backend != "openvino" or kept == {k.product.name for k in kernels if k.product.may_saturate}
    else:
        assert in_float == expected
    assert len(kernels) > (30 if case.get("levels") == 2 else 15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_that_could_saturate_run_in_float(backend: str, frozen: Callable[..., Any]) -> None:
    denoiser = frozen(bits=8)
    stand_in = engine_of(backend, denoiser, saturates=True)
    risky = [k for k in stand_in.engine.kernels() if k.product.may_saturate]
    assert len(risky) > 10
    assert all(not k.integer for k in risky)
    assert all(k.reason in {SATURATION, NO_CONVOLUTION} for k in risky)
    x, t = inputs()
    assert relative_error(stand_in(x, t).sample, denoiser(x, t).sample) < ROUNDING


def test_narrow_weights_stay_on_integers_on_every_processor(frozen: Callable[..., Any]) -> None:
    rules = [LayerRule("*", activation_bits=7, softmax_bits=7)]
    stand_in = engine_of("openvino", frozen(bits=4, rules=rules), saturates=True)
    assert all(k.integer for k in stand_in.engine.kernels())


@pytest.mark.parametrize("backend", BACKENDS)
def test_load_quantized_gives_an_ordinary_pipeline(backend: str, artifact: Path) -> None:
    simulated, loaded = load_quantized(artifact), load_quantized(artifact, backend=backend, threads=1)
    sampler = SamplerConfig("DDIMScheduler", 4)
    expected, got = (sample(p.unet, p.scheduler, sampler, [0, 1], seed=3) for p in (simulated, loaded))
    assert relative_error(got, expected) < ROUNDING
    image = loaded(batch_size=1, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 8, 8, 1)
    assert loaded.unet.config == simulated.unet.config
    assert loaded.unet.dtype is torch.float32


def test_what_the_graph_was_not_exported_for(frozen: Callable[..., Any]) -> None:
    stand_in = engine_of("onnxruntime", frozen())
    x, t = inputs()
    with pytest.raises(UserError, match=r"sample: the graph was exported for shape \(B, 1, 8, 8\), got \(4, 1, 6, 8\)"):
        stand_in(x[:, :, :6], t)
    with pytest.raises(UserError, match="timestep"):
        stand_in(x, t[:3])
    with pytest.raises(UserError, match="class_labels: the exported graph has no such input"):
        stand_in(x, t, class_labels=torch.zeros(4))
    (prediction,) = stand_in(x, 3, return_dict=False)
    assert prediction.shape == x.shape


def test_wrong_options_are_named(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="backend: unknown backend 'tensorrt'; expected one of onnxruntime, openvino"):
        load_quantized(artifact, backend="tensorrt")
    with pytest.raises(UserError, match="thread: backend 'openvino' has no such option"):
        load_quantized(artifact, backend="openvino", thread=2)
    with pytest.raises(UserError, match=r"provider: expected one of .* got 'NoSuch'"):
        load_quantized(artifact, backend="onnxruntime", provider="NoSuch")
    with pytest.raises(UserError, match="no such file"):
        load_quantized(artifact, backend="openvino", model=tmp_path / "none.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"\x08\x0anot a graph")
    for backend in BACKENDS:
        with pytest.raises(UserError, match="damaged"):
            load_quantized(artifact, backend=backend, model=damaged)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'tcaq-lightning\[openvino\]'"):
        load_quantized(artifact, backend="openvino")


def test_other_versions_are_refused() -> None:
    with pytest.raises(UserError, match="expected export version 3, got 1"):
        GraphInfo.from_json('{"version": 1}', "file")
    with pytest.raises(UserError, match="none of its properties"):
        GraphInfo.from_json("", "file")
