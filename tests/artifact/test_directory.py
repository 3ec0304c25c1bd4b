from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors import safe_open
from torch import Tensor, nn

from tcaq_lightning.artifact.blobs import fuse, restore, stored_tensors
from tcaq_lightning.artifact.directory import artifact_sizes, freeze, save_artifact, write_checksums
from tcaq_lightning.artifact.structure import Structure, describe, rebuild
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.config import LayerRule, QuantizationConfig, SamplerConfig, WeightConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import sample
from tcaq_lightning.nn.parts import output_quantizers, quant_layers, quantizers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers import ActivationQuantizer, CodedWeight, SoftmaxQuantizer
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tests.tiny_models import tiny_unet

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SAMPLERS = [
    SamplerConfig("DDIMScheduler", 4),
    SamplerConfig("UniPCMultistepScheduler", 4),
    SamplerConfig("DDPMScheduler", 3),
]


@torch.no_grad()
def set_parameters(denoiser: nn.Module, reparameterize: bool = True) -> None:
    """What a calibration would set, at random; bias corrections exact in float16."""
    generator = torch.Generator().manual_seed(1)
    for q in quantizers(denoiser).values():
        levels = 2**q.bits - 1
        if isinstance(q, SoftmaxQuantizer):
            logarithmic = torch.rand(q.tau.shape, generator=generator) < 0.5
            q.tau.copy_(torch.where(logarithmic, torch.tensor(12 / 37), torch.tensor(0.0)))
            q.delta.copy_(torch.where(logarithmic, torch.tensor(1.0), torch.tensor(1 / levels)))
            continue
        q.delta.copy_((4 + torch.rand(q.delta.shape, generator=generator)) / levels)
        q.zero_point.copy_(torch.randint(levels // 3, levels // 2 + 1, q.zero_point.shape, generator=generator))
        if reparameterize and q.r.numel() > 1:
            q.r.copy_(0.5 + torch.rand(q.r.shape, generator=generator))
    for layer in quant_layers(denoiser).values():
        layer.learned_weight.search(layer.input_quantizer.r)
        v = layer.learned_weight.v
        v.copy_(torch.randn(v.shape, generator=generator))
        if reparameterize and layer.input_quantizer.shift is not None:
            layer.input_quantizer.shift.copy_(
                torch.randn(layer.input_quantizer.shift.shape, generator=generator).half() / 8
            )
            layer.set_shift()
        if layer.bias_shift is not None:
            layer.bias_shift.copy_((torch.randn(layer.bias_shift.shape, generator=generator) / 50).half())


def calibrated(config: QuantizationConfig, boundaries: list[float], reparameterize: bool = True) -> UNet2DModel:
    denoiser = tiny_unet()
    quantize(denoiser, config, TimestepGroups(boundaries))
    set_parameters(denoiser, reparameterize)
    return denoiser.requires_grad_(False)


def as_pipeline(denoiser: nn.Module) -> DDIMPipeline:
    pipeline = DDIMPipeline(denoiser, DDIMScheduler(num_train_timesteps=100))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples(pipeline: Any, sampler: SamplerConfig) -> Tensor:
    return sample(pipeline.unet, pipeline.scheduler, sampler, [0, 1], seed=3)


def mixed_prediction(denoiser: nn.Module) -> Tensor:
    """A batch whose samples are in different timestep groups."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        prediction: Tensor = denoiser(x, torch.tensor([3, 40, 70, 99]), return_dict=False)[0]
    return prediction


def config_of(bits: int, symmetric: bool = True) -> QuantizationConfig:
    return QuantizationConfig(weight=WeightConfig(bits, symmetric))


BOUNDARIES = [30.0, 60.0]
RULES = [
    LayerRule("conv_in", keep=True),
    LayerRule("mid_block.attentions.0", keep=True),
    LayerRule("*.to_out.0", weight_bits=8, activation_bits=6),
    LayerRule("up_blocks.0.attentions.*", softmax_bits=3),
    LayerRule("down_blocks.1.attentions.0.to_k", activation_bits=5),  # does not share with q and v
]
CASES = [(config_of(bits), BOUNDARIES, True) for bits in (2, 3, 4, 5, 6, 7, 8)] + [
    (config_of(4, symmetric=False), BOUNDARIES, True),
    (config_of(3, symmetric=False), BOUNDARIES, False),
    (QuantizationConfig(rules=RULES), BOUNDARIES, True),
    (config_of(4), [], True),
    (QuantizationConfig(rules=[LayerRule("*", keep=True)]), [], False),
]


@pytest.mark.parametrize("case", CASES)
def test_freeze_save_and_load_keep_every_bit(
    case: tuple[QuantizationConfig, list[float], bool], tmp_path: Path
) -> None:
    pipeline = as_pipeline(calibrated(*case))
    before = [samples(pipeline, s) for s in SAMPLERS]
    mixed = mixed_prediction(pipeline.unet)
    assert all(x.isfinite().all() for x in before)
    assert all(x.std() > 0.05 for x in before)

    freeze(pipeline.unet)
    assert all(torch.equal(samples(pipeline, s), x) for s, x in zip(SAMPLERS, before, strict=True))
    save_artifact(pipeline, "unet", pipeline.unet, tmp_path / "q", {})
    packed = load_quantized(tmp_path / "q")
    assert all(torch.equal(samples(packed, s), x) for s, x in zip(SAMPLERS, before, strict=True))
    assert torch.equal(mixed_prediction(packed.unet), mixed)
    loaded = load_quantized(tmp_path / "q", packed=False)
    assert torch.equal(mixed_prediction(loaded.unet), mixed)
    kept, found = pipeline.unet.state_dict(), loaded.unet.state_dict()
    assert kept.keys() == found.keys()
    assert all(torch.equal(kept[key], found[key]) and kept[key].dtype is found[key].dtype for key in kept)


def test_freeze_drops_floats_and_rounds_shifts_only() -> None:
    denoiser = calibrated(config_of(4), BOUNDARIES)
    layer = denoiser.conv_out
    layer.bias_shift.fill_(0.1)
    layer.bias_shift[0, 0] = 1e9
    expected = {n: m.learned_weight.codes(m.input_quantizer.r) for n, m in quant_layers(denoiser).items()}
    weights = sum(code.numel() for code in expected.values())
    freeze(denoiser)
    assert layer.bias_shift[1, 0] == torch.tensor(0.1).half()
    assert layer.bias_shift[0, 0] == torch.finfo(torch.float16).max
    for name, frozen in quant_layers(denoiser).items():
        assert isinstance(frozen.weight_quantizer, CodedWeight)
        assert torch.equal(frozen.weight_quantizer.codes.float(), expected[name])
    floats = sum(t.numel() for t in denoiser.state_dict().values() if t.is_floating_point())
    assert floats < weights / 4
    once = copy.deepcopy(denoiser.state_dict())
    freeze(denoiser)
    assert all(torch.equal(once[key], value) for key, value in denoiser.state_dict().items())


@pytest.fixture(scope="module")
def frozen_pipeline() -> DDIMPipeline:
    pipeline = as_pipeline(calibrated(config_of(4), BOUNDARIES))
    freeze(pipeline.unet)
    return pipeline


@pytest.fixture
def artifact(frozen_pipeline: DDIMPipeline, tmp_path: Path) -> Path:
    save_artifact(frozen_pipeline, "unet", frozen_pipeline.unet, tmp_path / "q", {"fid": 1.5, "name": "β"})
    return tmp_path / "q"


def test_ordinary_pipeline_call(frozen_pipeline: DDIMPipeline, artifact: Path) -> None:
    import tcaq_lightning

    loaded = tcaq_lightning.load_quantized(artifact, device="cpu")
    assert type(loaded) is DDIMPipeline
    images = [
        p(2, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images
        for p in (frozen_pipeline, loaded)
    ]
    assert (images[0] == images[1]).all()
    assert images[0].shape == (2, 8, 8, 1)


def test_loaded_denoiser_is_frozen_shared_and_silent(artifact: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    denoiser = load_quantized(str(artifact)).unet
    assert torch.equal(torch.rand(3), expected)
    assert not any(m.training for m in denoiser.modules())
    assert not any(p.requires_grad for p in denoiser.parameters())
    attention = denoiser.mid_block.attentions[0]
    assert attention.to_q.input_quantizer is attention.to_k.input_quantizer is attention.to_v.input_quantizer
    groups = {id(q.groups) for q in quantizers(denoiser).values()}
    assert len(groups) == 1
    for tensor in denoiser.state_dict().values():
        assert tensor.data_ptr() % 16 == 0


def test_weights_stay_packed_in_memory(artifact: Path) -> None:
    with safe_open(artifact / WEIGHTS, "pt") as file:
        stored = file.get_tensor("codes")
    loaded, unpacked = load_quantized(artifact).unet, load_quantized(artifact, packed=False).unet
    weights = {name: layer.weight_quantizer for name, layer in sorted(quant_layers(loaded).items())}
    assert torch.equal(torch.cat([weight.packed for weight in weights.values()]), stored)
    assert sum(weight.packed.untyped_storage().nbytes() for weight in weights.values()) == stored.numel()
    assert not any(isinstance(value, Tensor) for w in weights.values() for value in vars(w).values())  # nothing cached
    mixed_prediction(loaded)
    assert {key.rpartition(".")[2] for key in weights["conv_in"].state_dict()} == {"packed", "scale", "zero_point"}
    for name, layer in quant_layers(unpacked).items():
        assert torch.equal(weights[name].codes, layer.weight_quantizer.codes)
    with pytest.raises(UserError, match="pack: backend 'torch' has no such option; it has packed"):
        load_quantized(artifact, pack=True)


def test_state_dict_of_packed_weights_goes_from_one_to_another(artifact: Path) -> None:
    first, second = load_quantized(artifact).unet, load_quantized(artifact).unet
    expected = mixed_prediction(first)
    with torch.no_grad():
        for tensor in second.state_dict().values():
            tensor.zero_()
    assert not torch.equal(mixed_prediction(second), expected)
    second.load_state_dict(first.state_dict())
    assert torch.equal(mixed_prediction(second), expected)
    copied = copy.deepcopy(first)
    assert torch.equal(mixed_prediction(copied), expected)


def test_pipeline_changes_its_type(artifact: Path) -> None:
    pipeline = load_quantized(artifact)
    expected, scales = samples(pipeline, SAMPLERS[0]), copy.deepcopy(pipeline.unet.state_dict())
    pipeline.to("cpu", torch.float32)
    assert torch.equal(samples(pipeline, SAMPLERS[0]), expected)
    pipeline.to(torch.bfloat16)
    assert pipeline.unet.conv_norm_out.weight.dtype is torch.bfloat16
    assert all(layer.dtype is torch.bfloat16 for layer in quant_layers(pipeline.unet).values())
    quantized = tuple(quant_layers(pipeline.unet)) + tuple(n for n in scales if ".processor." in n)
    for key, value in pipeline.unet.state_dict().items():
        if key.startswith(quantized):  # as it was: bfloat16 holds no scale
            assert torch.equal(value, scales[key])
            assert value.dtype is scales[key].dtype
    changed = samples(pipeline, SAMPLERS[0]).float()
    assert 0 < (changed - expected).norm() < 0.03 * expected.norm()
    assert pipeline(1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_saving_a_loaded_artifact_gives_the_same_files(artifact: Path, tmp_path: Path) -> None:
    loaded = load_quantized(artifact)
    save_artifact(loaded, "unet", loaded.unet, tmp_path / "again", {"fid": 1.5, "name": "β"})
    files = sorted(f.relative_to(artifact) for f in artifact.rglob("*") if f.is_file())
    assert [f.as_posix() for f in files] == [
        "checksums.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        WEIGHTS,
    ]
    for file in files:
        assert (artifact / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
        assert b"_name_or_path" not in (artifact / file).read_bytes()


def test_chosen_scheduler_settings_are_kept_and_others_stay_defaults(artifact: Path) -> None:
    chosen = json.loads((artifact / "scheduler/scheduler_config.json").read_text())
    assert chosen == {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": chosen["_diffusers_version"],
        "num_train_timesteps": 100,
    }
    own, loaded = DDIMScheduler(num_train_timesteps=100), load_quantized(artifact).scheduler
    assert {k: v for k, v in own.config.items() if k[0] != "_"} == {
        k: v for k, v in loaded.config.items() if k[0] != "_"
    }


def test_contents(artifact: Path, frozen_pipeline: DDIMPipeline) -> None:
    config = json.loads((artifact / "unet/config.json").read_text())
    assert config["_class_name"] == "UNet2DModel"
    assert config["block_out_channels"] == [16, 32]
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["version"]) == ("tcaq", 1)
    assert quantization["metadata"] == {"fid": 1.5, "name": "β"}
    assert quantization["timestep_boundaries"] == BOUNDARIES
    assert quantization["layers"].keys() == quant_layers(frozen_pipeline.unet).keys()
    assert quantization["layers"]["mid_block.attentions.0.to_v"] == {
        "kind": "Linear",
        "weight_bits": 4,
        "activation_bits": 8,
        "symmetric": True,
        "reparameterized": True,
        "shifted": True,
        "input_of": "mid_block.attentions.0.to_q",
    }
    with safe_open(artifact / WEIGHTS, "pt") as file:
        sizes = {key: (str(file.get_tensor(key).dtype), file.get_tensor(key).numel()) for key in file.keys()}  # noqa: SIM118
    layers = quant_layers(frozen_pipeline.unet).values()
    activations = [q for q in quantizers(frozen_pipeline.unet).values() if isinstance(q, ActivationQuantizer)]
    assert sizes.keys() == {"codes", "zero_points", "shifts", "bias_shifts", "float32"}
    assert sizes["shifts"] == ("torch.float16", sum(q.shift.numel() for q in activations if q.shift is not None))
    assert sizes["codes"] == ("torch.uint8", sum(-(-layer.weight_quantizer.codes.numel() // 2) for layer in layers))
    assert sizes["zero_points"] == ("torch.uint8", 3 * len(activations))
    shifts = [layer.bias_shift.numel() for layer in layers if layer.bias_shift is not None]
    assert sizes["bias_shifts"] == ("torch.float16", sum(shifts))
    assert artifact_sizes(artifact) == sum((artifact / "unet" / f).stat().st_size for f in ("config.json", WEIGHTS[5:]))


def test_quantized_outputs_round_trip(tmp_path: Path) -> None:
    config = config_of(4)
    config.integer_ready = True
    denoiser = calibrated(config, BOUNDARIES)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for outputs in output_quantizers(denoiser):
            outputs.delta.copy_(20 + 5 * torch.rand(outputs.delta.shape, generator=generator))
            outputs.offset.copy_(torch.randint(-(2**20), 2**20, outputs.offset.shape, generator=generator))
    freeze(denoiser)
    expected = mixed_prediction(denoiser)
    save_artifact(as_pipeline(denoiser), "unet", denoiser, tmp_path / "quantized", {})
    loaded = load_quantized(tmp_path / "quantized").unet
    assert torch.equal(mixed_prediction(loaded), expected)
    assert len(output_quantizers(loaded)) == len(output_quantizers(denoiser)) > 20
    quantization = json.loads((tmp_path / "quantized/unet/config.json").read_text())["quantization_config"]
    assert quantization["version"] == 2  # releases that know no quantized outputs must refuse it
    assert quantization["layers"]["conv_in"]["quantized_output"] is True
    assert "quantized_output" not in quantization["layers"]["time_embedding.linear_1"]
    for outputs in output_quantizers(loaded):  # they take part
        outputs.enabled = False
    assert not torch.equal(mixed_prediction(loaded), expected)


def flip(file: Path, position: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(position * (len(data) - 1))] ^= 0x04
    file.write_bytes(bytes(data))


FILES = ["checksums.json", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named(artifact: Path, name: str) -> None:
    file, intact = artifact / name, (artifact / name).read_bytes()
    damages: list[Callable[[], object]] = [lambda p=p: flip(file, p / 16) for p in range(17)]  # type: ignore[misc]
    damages += [lambda: file.write_bytes(intact[:-1]), lambda: file.write_bytes(b""), file.unlink]
    for damage in damages:
        damage()
        with pytest.raises(UserError) as caught:
            load_quantized(artifact)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
        file.write_bytes(intact)
    load_quantized(artifact)


def edit(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the config on purpose, so that the checksums fit it."""
    file = artifact / "unet/config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    write_checksums(artifact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("quantization_config"), "no quantization_config"),
        (lambda c: c["quantization_config"].update(version=3), r"version 1 or 2, got \('tcaq', 3\)"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "got .'gptq', 1"),
        (lambda c: c["quantization_config"].pop("layers"), "tables do not fit a UNet2DModel"),
        (lambda c: c["quantization_config"]["layers"].update(conv_mid={"kind": "Conv2d"}), "conv_mid"),
        (lambda c: c["quantization_config"]["layers"]["conv_in"].update(kind="Linear"), "conv_in is a Conv2d"),
        (lambda c: c["quantization_config"]["layers"]["conv_in"].update(weight_bits=9), "2..8, got 9"),
        (lambda c: c["quantization_config"]["layers"]["conv_in"].update(weight_bits=5), "elements"),
        (lambda c: c["quantization_config"]["layers"].pop("conv_in"), "elements"),
        (lambda c: c["quantization_config"]["timestep_boundaries"].pop(), "elements"),
        (lambda c: c.update(block_out_channels=[16, 64]), "elements"),
        (lambda c: c.update(_class_name="NoSuchModel"), "NoSuchModel, which diffusers"),
    ],
)
def test_table_of_another_model_is_refused(
    artifact: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(artifact, change)
    with pytest.raises(UserError, match=message) as caught:
        load_quantized(artifact)
    assert str(artifact / "unet") in str(caught.value)


def test_no_artifact_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load_quantized(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model_index\.json is missing"):
        load_quantized(tmp_path)
    as_pipeline(tiny_unet()).save_pretrained(tmp_path / "float")
    with pytest.raises(UserError, match="full-precision model"):
        load_quantized(tmp_path / "float")


def test_replaces_an_artifact_but_nothing_else(frozen_pipeline: DDIMPipeline, artifact: Path, tmp_path: Path) -> None:
    for state in ("incoming", "outgoing"):  # what a killed save may leave
        (tmp_path / f".q.{state}").mkdir()
        (tmp_path / f".q.{state}" / "rest").touch()
    (artifact / WEIGHTS).write_bytes(b"damaged")
    save_artifact(frozen_pipeline, "unet", frozen_pipeline.unet, artifact, {"run": 2})
    load_quantized(artifact)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]

    other = tmp_path / "photos"
    other.mkdir()
    save_artifact(frozen_pipeline, "unet", frozen_pipeline.unet, other, {})  # empty: nothing is lost
    (other / "checksums.json").unlink()
    with pytest.raises(UserError, match="not an artifact"):
        save_artifact(frozen_pipeline, "unet", frozen_pipeline.unet, other, {})
    assert (other / WEIGHTS).exists()


def test_failed_save_leaves_the_old_artifact(frozen_pipeline: DDIMPipeline, artifact: Path, tmp_path: Path) -> None:
    before = samples(load_quantized(artifact), SAMPLERS[0])
    with pytest.raises(TypeError):
        save_artifact(frozen_pipeline, "unet", frozen_pipeline.unet, artifact, {"not JSON": object()})
    assert torch.equal(samples(load_quantized(artifact), SAMPLERS[0]), before)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_refuses_what_cannot_be_stored_exactly(tmp_path: Path) -> None:
    pipeline = as_pipeline(calibrated(config_of(4), BOUNDARIES))
    with pytest.raises(ValueError, match="freeze"):
        save_artifact(pipeline, "unet", pipeline.unet, tmp_path / "q", {})
    freeze(pipeline.unet)
    for tensor, value in [
        (pipeline.unet.conv_in.input_quantizer.zero_point, 0.5),
        (pipeline.unet.conv_in.input_quantizer.zero_point, -1.0),
        (pipeline.unet.conv_out.bias_shift, 0.1),
        (pipeline.unet.conv_out.weight_quantizer.scale, torch.nan),
    ]:
        intact = tensor.clone()
        tensor.fill_(value)
        with pytest.raises(ValueError, match=r"conv_(in|out)\..* is NaN or not exactly"):
            save_artifact(pipeline, "unet", pipeline.unet, tmp_path / "q", {})
        tensor.copy_(intact)
    assert not list(tmp_path.iterdir())


def test_cross_attention_denoiser_round_trips() -> None:
    def build() -> UNet2DConditionModel:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()

    denoiser, fresh = build(), build()
    quantize(denoiser, config_of(3, symmetric=False), TimestepGroups(BOUNDARIES))
    set_parameters(denoiser)
    freeze(denoiser)
    structure = describe(denoiser)
    blobs = fuse(stored_tensors(denoiser))
    copied = Structure.from_dict(json.loads(json.dumps(structure.to_dict())))
    assert copied == structure
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(torch.nan)
    rebuild(fresh, copied)
    restore(stored_tensors(fresh), blobs)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    with torch.no_grad():
        outputs = [d(x, torch.tensor([10, 70]), text).sample for d in (denoiser, fresh)]
    assert outputs[0].isfinite().all()
    assert torch.equal(*outputs)


def test_package_import_is_light() -> None:
    """That of the commands, too: help does not wait for torch."""
    code = "import sys, tcaq_lightning.__main__; assert not {'torch', 'diffusers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    import tcaq_lightning

    with pytest.raises(AttributeError, match="no attribute 'load'"):
        _ = tcaq_lightning.load
