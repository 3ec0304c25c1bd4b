"""Denoisers with a context or class labels, on the engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tcaq_lightning.architectures import example_samples
from tcaq_lightning.artifact import freeze
from tcaq_lightning.config import QuantizationConfig, WeightConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.export.build import TOKENS, build_graph, context_tokens
from tcaq_lightning.export.engines import EngineDenoiser, open_engine
from tcaq_lightning.export.kernels import check_kernels
from tcaq_lightning.quantized_layers import quantize
from tcaq_lightning.timesteps import TimestepGroups
from tests.export.conftest import BOUNDARIES, set_parameters
from tests.families import make_denoiser


def frozen_of(family: str) -> Any:
    denoiser = make_denoiser(family)
    quantize(denoiser, QuantizationConfig(WeightConfig(4)), TimestepGroups([10 * b for b in BOUNDARIES]))
    set_parameters(denoiser)
    freeze(denoiser)
    return denoiser.requires_grad_(False)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("family", ["Stable Diffusion 1", "DiT"])
@torch.no_grad()
def test_engines_take_context_and_labels(family: str, backend: str) -> None:
    denoiser = frozen_of(family)
    content, info = build_graph(denoiser, "artifact", TOKENS)
    further = {"Stable Diffusion 1": "encoder_hidden_states", "DiT": "class_labels"}[family]
    assert set(info.inputs) == {next(iter(info.inputs)), "timestep", further}
    stand_in = EngineDenoiser(open_engine(backend, content, info, {"threads": 1}), type(denoiser), denoiser.config)
    torch.manual_seed(0)
    samples = example_samples(denoiser, 3)
    arguments = samples.conditioning.tensors[0]  # (1, B, ...)
    arguments.copy_(torch.randn(arguments.shape) if arguments.is_floating_point() else torch.tensor([0, 2, 1]))
    expected, got = samples.predict(denoiser), samples.predict(stand_in)
    assert ((got - expected).square().sum() / expected.square().sum()) < 1e-3
    kernels = stand_in.engine.kernels()
    check_kernels(kernels, backend)
    assert sum(kernel.integer for kernel in kernels) > 10
    other = samples.conditioning.tensors[0]
    other.copy_(other.flip(1))
    assert ((samples.predict(stand_in) - got).square().sum() / got.square().sum()) > 1e-6


def test_other_attention_is_named() -> None:
    with pytest.raises(UserError, match=r"unsupported attention .* \(QuantJointAttnProcessor\)"):
        build_graph(frozen_of("SD3"), "artifact")


def test_length_of_the_context() -> None:
    class Pipeline:
        def __init__(self, **parts: Any) -> None:
            vars(self).update(parts)

    class Tokenizer:
        model_max_length = 16

    assert context_tokens(Pipeline(class_embedder=object())) == 1
    assert context_tokens(Pipeline(tokenizer=Tokenizer())) == 16
    assert context_tokens(Pipeline()) == TOKENS
