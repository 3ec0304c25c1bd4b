"""Denoisers of every family on the engines, with all that they are called with."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tcaq_lightning.artifact.directory import freeze
from tcaq_lightning.backends.engines import open_engine
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.backends.graph.inputs import GraphInput, context_tokens, example_inputs
from tcaq_lightning.backends.graph_info import GraphInfo
from tcaq_lightning.backends.kernels import SATURATION, check_kernels
from tcaq_lightning.backends.saturation import sums_saturate
from tcaq_lightning.backends.stand_in import EngineDenoiser
from tcaq_lightning.config import ActivationConfig, QuantizationConfig, WeightConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import Sizes
from tcaq_lightning.nn.attention import QuantAttnProcessor
from tests.backends.conftest import set_parameters
from tests.families import FAMILIES, W4A8, Family, make_family

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
BACKENDS = ("openvino", "onnxruntime")
SIZES = {"Flux": Sizes(5, (6, 8)), "Flux, no guidance": Sizes(5, (6, 8))}
"""What `tests.families` calls them with: 3 x 4 patches; 5 tokens and 8 x 8 latents elsewhere."""
FLOW = ("Flux", "Flux, no guidance")
INPUTS = {
    "UNet2DModel": [],
    "Stable Diffusion 1": ["encoder_hidden_states"],
    "SDXL": ["encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"],
    "DiT": ["class_labels"],
    "PixArt": ["encoder_hidden_states", "encoder_attention_mask"],
    "PixArt, sizes": [
        "encoder_hidden_states",
        "encoder_attention_mask",
        "added_cond_kwargs.resolution",
        "added_cond_kwargs.aspect_ratio",
    ],
    "SD3": ["encoder_hidden_states", "pooled_projections"],
    "Flux": ["encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids", "guidance"],
}
FAST = (("PixArt, sizes", "openvino"), ("Flux", "onnxruntime"))
"""One of each new kind of input, and of attention."""
EVERY = [
    pytest.param(family, backend, marks=() if (family, backend) in FAST else pytest.mark.slow)
    for family in FAMILIES
    for backend in BACKENDS
]


def frozen_of(family: str, config: QuantizationConfig = W4A8, **options: Any) -> Family:
    made = make_family(family, config, **options)
    set_parameters(made.quantized)
    freeze(made.quantized)
    made.quantized.requires_grad_(False)
    return made


@cache  # building takes seconds
def graph_of(family: str) -> tuple[Family, bytes, GraphInfo]:
    made = frozen_of(family)
    return made, *build_graph(made.quantized, "artifact", SIZES.get(family, Sizes(5)))


def stand_in_for(made: Family, content: bytes, info: GraphInfo, backend: str) -> EngineDenoiser:
    engine = open_engine(backend, content, info, {"threads": 1})
    return EngineDenoiser(engine, type(made.quantized), made.quantized.config)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).square().sum() / expected.square().sum())


def without_mask(made: Family, part: slice) -> Tensor:
    """What is simulated where no context is masked: a UNet's graph takes no mask."""
    args, kwargs = made.arguments(part)
    return made.quantized(*args, **{k: v for k, v in kwargs.items() if k != "encoder_attention_mask"})[0]


@pytest.mark.parametrize(("family", "backend"), EVERY)
@torch.no_grad()
def test_engines_compute_every_family(family: str, backend: str) -> None:
    made, content, info = graph_of(family)
    stand_in = stand_in_for(made, content, info, backend)
    names = list(info.inputs)
    assert names[1:] == ["timestep", *INPUTS.get(family, names[2:])]
    for part in (slice(0, 7), slice(3, 4)):
        args, kwargs = made.arguments(part)
        if not family.startswith("PixArt"):
            kwargs.pop("encoder_attention_mask", None)  # a UNet's graph takes none
        expected = made.quantized(*args, **kwargs)[0]
        assert relative_error(stand_in(*args, **kwargs)[0], expected) < 1e-3
    kernels = stand_in.engine.kernels()
    check_kernels(kernels, backend)
    suited = [kernel for kernel in kernels if kernel.reason != SATURATION or not sums_saturate()]
    if not sums_saturate():
        assert sum(kernel.integer for kernel in kernels) > 10
    if backend == "openvino":
        assert all(kernel.integer for kernel in suited), [k for k in suited if not k.integer]
    assert sum(k.product.name.endswith("(P v)") for k in kernels) > 1


@pytest.mark.parametrize(
    "family", ["Flux", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SDXL", "PixArt, sizes"))]
)
@torch.no_grad()
def test_every_input_counts(family: str) -> None:
    made, content, info = graph_of(family)
    stand_in = stand_in_for(made, content, info, "onnxruntime")
    args, kwargs = made.arguments(slice(0, 2))
    if family == "SDXL":
        kwargs.pop("encoder_attention_mask", None)
    before = stand_in(*args, **kwargs)[0]

    def moved(values: Any) -> list[Any]:
        """Copies of the arguments in which one tensor each is another."""
        found = []
        for key, value in values.items():
            if isinstance(value, dict):
                found += [values | {key: inner} for inner in moved(value)]
            elif isinstance(value, Tensor):
                found.append(values | {key: 1 - value if "mask" in key else value * 0.5 + 1})
        return found

    changed = moved(kwargs)
    assert len(changed) >= 3
    for other in changed:
        assert relative_error(stand_in(*args, **other)[0], before) > 1e-9, {
            k for k in other if other[k] is not kwargs[k]
        }


def test_a_mask_may_be_left_out() -> None:
    described = GraphInput.of("encoder_attention_mask", torch.ones(2, 5))
    assert torch.equal(described.filled(3), torch.ones(3, 5))
    assert GraphInput.of("pooled_projections", torch.ones(2, 5)).filled(3) is None


def test_positions_have_no_axis_for_the_batch() -> None:
    assert GraphInput.of("img_ids", torch.zeros(12, 3)).sizes(4) == (12, 3)
    assert GraphInput.of("guidance", torch.zeros(2)).sizes(4) == (4,)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("DiT", "onnxruntime"),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("DiT", "openvino"), ("SD3", "openvino"))),
    ],
)
@torch.no_grad()
def test_steps_of_every_token(family: str, backend: str) -> None:
    made = frozen_of(family, QuantizationConfig(WeightConfig(4), ActivationConfig(8, dynamic_per_token=True)))
    stand_in = stand_in_for(made, *build_graph(made.quantized, "artifact", Sizes(5)), backend)
    assert relative_error(made.predict(stand_in), made.predict(made.quantized)) < 1e-3
    kernels = stand_in.engine.kernels()
    check_kernels(kernels, backend)
    assert sums_saturate() or sum(kernel.integer for kernel in kernels) > 10


@pytest.mark.slow
@torch.no_grad()
def test_narrow_types_are_exported_in_float32() -> None:
    made = frozen_of("DiT", dtype=torch.bfloat16)
    stand_in = stand_in_for(made, *build_graph(made.quantized, "artifact"), "onnxruntime")
    got, expected = made.predict(stand_in), made.predict(made.quantized)
    assert got.dtype is torch.bfloat16
    assert relative_error(got.float(), expected.float()) < 5e-3


def test_what_the_exporter_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    made = frozen_of("SD3")
    kind = type(made.quantized.transformer_blocks[0].attn.processor)

    def attend(self: Any, *args: Any) -> Any:
        return QuantAttnProcessor.attend(self, *args)

    monkeypatch.setattr(kind, "attend", attend)
    with pytest.raises(UserError, match=r"unsupported attention .* \(QuantJointAttnProcessor\)"):
        build_graph(made.quantized, "artifact", Sizes(5))
    unet = make_family("UNet2DModel").full
    unet.register_to_config(class_embed_type="timestep")
    with pytest.raises(UserError, match="UNet2DModel with class_embed_type 'timestep'"):
        example_inputs(unet)


def test_length_of_the_context() -> None:
    class Pipeline:
        def __init__(self, **parts: Any) -> None:
            vars(self).update(parts)

        def __call__(self) -> None: ...

    class Transformer(Pipeline):
        def __call__(self, max_sequence_length: int = 120) -> None: ...

    class Tokenizer:
        model_max_length = 16

    assert context_tokens(Pipeline(class_embedder=object())) == 1
    assert context_tokens(Pipeline(tokenizer=Tokenizer())) == 16
    assert context_tokens(Pipeline()) is None
    assert context_tokens(Transformer(tokenizer=Tokenizer())) == 120
    assert context_tokens(Transformer(tokenizer_3=Tokenizer(), tokenizer_max_length=77)) == 197
