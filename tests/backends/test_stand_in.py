"""An engine's denoiser in a pipeline: saved, copied and set like the one that it stands for, or refused in one line."""

from __future__ import annotations

import copy
import json
import pickle  # noqa: TID251 - as a user may
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor, SlicedAttnProcessor
from torch import nn

from tcaq_lightning.artifact.directory import freeze, save_artifact
from tcaq_lightning.artifact.saved import SavedDenoiser
from tcaq_lightning.backends.engines import open_engine
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.backends.stand_in import EngineDenoiser
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import Sizes
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tests.backends.conftest import set_parameters
from tests.families import W4A8, make_family
from tests.toy_pipelines import make_pipeline

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
BACKENDS = ("openvino", "onnxruntime")
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
T = torch.tensor([3, 70])
FIXED = r"^{}: expected a denoiser that PyTorch runs, .* load_quantized\(path, backend=\"torch\"\)$"


@pytest.fixture(scope="module", params=BACKENDS)
def loaded(request: pytest.FixtureRequest, artifact: Path) -> tuple[str, Any]:
    return request.param, load_quantized(artifact, backend=request.param, threads=1)


def test_it_passes_for_the_denoiser(loaded: tuple[str, Any]) -> None:
    _, pipeline = loaded
    unet = pipeline.unet
    assert isinstance(unet, (EngineDenoiser, UNet2DModel))
    assert isinstance(unet, UNet2DModel)
    assert type(unet) == UNet2DModel  # noqa: E721 - as diffusers compares
    assert type(unet).__name__ == "UNet2DModel"
    assert pipeline.config["unet"] == ("diffusers", "UNet2DModel")
    assert type(unet).from_config(unet.config).conv_in.weight.device.type == "cpu"
    assert unet.device == torch.device("cpu")
    assert unet.conv_in.weight.shape == (16, 1, 3, 3)
    assert unet.to("cpu", torch.float16).dtype is next(unet.parameters()).dtype is torch.float32


def test_a_saved_pipeline_is_the_artifact_again(loaded: tuple[str, Any], artifact: Path, tmp_path: Path) -> None:
    backend, pipeline = loaded
    pipeline.save_pretrained(tmp_path / "whole")
    pipeline.unet.save_pretrained(tmp_path / "alone", is_main_process=True)
    assert json.loads((tmp_path / "whole" / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        expected = (artifact / "unet" / name).read_bytes()
        assert (tmp_path / "whole" / "unet" / name).read_bytes() == expected
        assert (tmp_path / "alone" / name).read_bytes() == expected
    again = load_quantized(tmp_path / "whole", backend=backend, threads=1)
    assert torch.equal(again.unet(X, T).sample, pipeline.unet(X, T).sample)
    simulated = load_quantized(artifact).unet
    assert torch.equal(UNet2DModel.from_pretrained(tmp_path / "alone")(X, T).sample, simulated(X, T).sample)
    again.save_pretrained(tmp_path / "whole")  # over its own files
    load_quantized(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "fp16"}, "variant: expected None, got 'fp16'"),
        ({"safe_serialization": False}, "safe_serialization: expected True, got False"),
        ({"push_to_hub": True}, "push_to_hub: expected False, got True"),
    ],
)
def test_what_an_artifact_is_not_saved_as(
    options: dict[str, Any], message: str, loaded: tuple[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        loaded[1].unet.save_pretrained(tmp_path / "unet", **options)
    assert not (tmp_path / "unet").exists()


def test_saving_without_the_files_is_one_line(artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    shutil.copytree(artifact, path)
    pipeline: Any = load_quantized(path, backend="onnxruntime", threads=1)
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"?")
    with pytest.raises(UserError, match=r"^save_pretrained: .* has changed since the artifact was opened.*$"):
        pipeline.save_pretrained(tmp_path / "saved")
    shutil.rmtree(path)
    with pytest.raises(UserError, match=r"^save_pretrained: .*config.json is gone since the artifact was opened.*$"):
        pipeline.save_pretrained(tmp_path / "saved")
    copied = copy.deepcopy(pipeline)  # its graph is at hand
    assert torch.equal(copied.unet(X, T).sample, pipeline.unet(X, T).sample)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipeline: pickle.loads(pickle.dumps(pipeline)),
    "components": lambda pipeline: DDIMPipeline(**pipeline.components),
    "from_pipe": DDPMPipeline.from_pipe,
}


FAST = [("openvino", "deepcopy"), *(("onnxruntime", kind) for kind in COPIES)]
EVERY = [
    pytest.param(backend, kind, marks=() if (backend, kind) in FAST else pytest.mark.slow)
    for backend in BACKENDS
    for kind in COPIES
]


@pytest.mark.parametrize(("loaded", "kind"), EVERY, indirect=["loaded"])
def test_copies_run_and_are_saved(kind: str, loaded: tuple[str, Any], tmp_path: Path) -> None:
    backend, pipeline = loaded
    copied = COPIES[kind](pipeline)
    assert torch.equal(copied.unet(X, T).sample, pipeline.unet(X, T).sample)
    if kind in ("deepcopy", "pickle"):
        assert copied.unet.engine is not pipeline.unet.engine
    copied.save_pretrained(tmp_path)
    assert load_quantized(tmp_path, backend=backend, threads=1).unet.saved.digest == pipeline.unet.saved.digest


def test_a_copy_of_a_graphs_file_opens_that_file(artifact: Path, tmp_path: Path) -> None:
    simulated: Any = load_quantized(artifact)
    file = tmp_path / "denoiser.onnx"
    digest = json.loads((artifact / "unet" / "config.json").read_text())["quantization_config"]["sha256"]
    file.write_bytes(build_graph(simulated.unet, digest)[0])
    pipeline: Any = load_quantized(artifact, backend="onnxruntime", threads=1, model=file)
    assert len(pickle.dumps(pipeline.unet.engine)) < 10_000
    assert torch.equal(copy.deepcopy(pipeline.unet)(X, T).sample, pipeline.unet(X, T).sample)
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        copy.deepcopy(pipeline)


def test_the_simulated_pipeline_moves_to_another_class_too(artifact: Path) -> None:
    pipeline: Any = load_quantized(artifact)
    moved = DDPMPipeline.from_pipe(pipeline)
    assert moved.unet is pipeline.unet
    again = pickle.loads(pickle.dumps(pipeline))
    with torch.no_grad():
        assert torch.equal(again.unet(X, T).sample, pipeline.unet(X, T).sample)


@cache  # building takes seconds
def conditioned(family: str) -> Any:
    made = make_family(family)
    set_parameters(made.quantized)
    freeze(made.quantized)
    content, info = build_graph(made.quantized, "artifact", Sizes(5))
    engine = open_engine("onnxruntime", content, info, {"threads": 1})
    return EngineDenoiser(engine, type(made.quantized), made.quantized.config)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "enable_freeu": lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "load_lora_adapter": lambda unet: unet.load_lora_adapter({}, prefix=None),
    "add_adapter": lambda unet: unet.add_adapter(None),
    "set_adapters": lambda unet: unet.set_adapters("a"),
    "fuse_lora": lambda unet: unet.fuse_lora(),
    "load_attn_procs": lambda unet: unet.load_attn_procs({}),
    "_load_ip_adapter_weights": lambda unet: unet._load_ip_adapter_weights([]),
    "attention processor IPAdapterAttnProcessor": lambda unet: unet.set_attn_processor(IPAdapterAttnProcessor(8, 12)),
    "enable_layerwise_casting": lambda unet: unet.enable_layerwise_casting(torch.bfloat16),
    "dequantize": lambda unet: unet.dequantize(),
    "state_dict": lambda unet: unet.state_dict(),
    "load_state_dict": lambda unet: unet.load_state_dict({}),
    "parameters": lambda unet: list(unet.parameters()),
    "named_parameters": lambda unet: list(unet.named_parameters()),
    "num_parameters": lambda unet: unet.num_parameters(),
    "requires_grad_": lambda unet: unet.requires_grad_(),
    "conv_in": lambda unet: setattr(unet, "conv_in", nn.Identity()),
    "processor": lambda unet: unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(None),
    "forward of a part of the denoiser": lambda unet: unet.conv_in(X),
    "register_forward_hook of a part of the denoiser": lambda unet: unet.conv_in.register_forward_hook(print),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_act_on_a_graph_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=FIXED.format(name)):
        REFUSED[name](conditioned("Stable Diffusion 1"))


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "slicing": lambda unet: unet.set_attention_slice("auto"),
    "xformers": lambda unet: unet.enable_xformers_memory_efficient_attention(),
    "default processors": lambda unet: unet.set_default_attn_processor(),
    "a processor that computes the same": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "a slower one by name": lambda unet: unet.set_attn_processor(
        dict.fromkeys(unet.attn_processors, SlicedAttnProcessor(2))
    ),
    "fused projections": lambda unet: unet.fuse_qkv_projections(),
    "separate projections": lambda unet: unet.unfuse_qkv_projections(),
    "checkpointing": lambda unet: unet.enable_gradient_checkpointing(),
    "group offloading": lambda unet: unet.enable_group_offload(torch.device("cpu")),
    "compile": lambda unet: unet.compile(),
    "no gradients": lambda unet: unet.requires_grad_(False),
    "no FreeU": lambda unet: unet.disable_freeu(),
    "no LoRA": lambda unet: unet.unload_lora(),
    "modes": lambda unet: unet.train().eval(),
    "types": lambda unet: unet.half().bfloat16().float(),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_settings_of_memory_and_speed_do_nothing(name: str) -> None:
    unet = conditioned("Stable Diffusion 1")
    assert isinstance(unet, UNet2DConditionModel)
    call = torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 12)
    expected = unet(*call).sample
    HARMLESS[name](unet)
    assert torch.equal(unet(*call).sample, expected)


def test_a_compiled_one_is_called_as_it_is() -> None:
    unet = conditioned("Stable Diffusion 1")
    call = torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 12)
    assert torch.equal(torch.compile(unet, backend="eager")(*call).sample, unet(*call).sample)


@pytest.mark.parametrize(
    ("name", "backend"), [("dit", "onnxruntime"), pytest.param("dit", "openvino", marks=pytest.mark.slow)]
)
def test_pipelines_of_transformers_are_saved_and_copied(name: str, backend: str, tmp_path: Path) -> None:
    pipeline: Any = make_pipeline(name)
    quantize(pipeline.transformer.requires_grad_(False).eval(), W4A8, TimestepGroups([300.0, 600.0]))
    set_parameters(pipeline.transformer)
    freeze(pipeline.transformer)
    save_artifact(pipeline, "transformer", pipeline.transformer, tmp_path / "artifact", {})
    loaded: Any = load_quantized(tmp_path / "artifact", backend=backend, threads=1)
    loaded.save_pretrained(tmp_path / "saved")
    again: Any = load_quantized(tmp_path / "saved", backend=backend, threads=1)
    size = loaded.transformer.config.sample_size
    call = torch.ones(2, loaded.transformer.config.in_channels, size, size), T, torch.tensor([1, 2])
    expected = loaded.transformer(*call).sample
    for other in (again, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(other.transformer(*call).sample, expected)
        assert type(other.transformer).__name__ == type(pipeline.transformer).__name__


def test_one_without_files_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere on disk"):
        conditioned("Stable Diffusion 1").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is gone"):
        SavedDenoiser(tmp_path / "nothing", "").copy_to(tmp_path / "copy")
