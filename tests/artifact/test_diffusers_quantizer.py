"""Artifacts through diffusers' own `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DModel
from torch import Tensor

from tcaq_lightning.artifact.diffusers_quantizer import DIGEST
from tcaq_lightning.artifact.directory import save_artifact
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.quantizers import PackedWeight
from tests.artifacts import frozen
from tests.text_models import make_text_model
from tests.tiny_models import tiny_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "quantized"
    pipeline = DDIMPipeline(frozen(tiny_unet()), DDIMScheduler())
    save_artifact(pipeline, "unet", pipeline.unet, path, {"fid": 1.5, "name": "β"})
    return path


@pytest.fixture
def artifact(saved: Path, tmp_path: Path) -> Path:
    path = tmp_path / "quantized"
    for file in saved.rglob("*"):
        if file.is_file():
            (path / file.relative_to(saved)).parent.mkdir(parents=True, exist_ok=True)
            (path / file.relative_to(saved)).write_bytes(file.read_bytes())
    return path


def prediction(denoiser: Any) -> Tensor:
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return denoiser(x, torch.tensor([30, 400, 900])).sample


def content(directory: Path) -> dict[str, Any]:
    """Bytes by file, and JSON without what diffusers notes about places; it writes schedulers with all defaults."""
    files: dict[str, Any] = {}
    for file in directory.rglob("*"):
        name = file.relative_to(directory).as_posix()
        if not file.is_file() or name.startswith(("tokenizer", "scheduler")) or file.name == "checksums.json":
            continue
        files[name] = file.read_bytes()
        if file.suffix == ".json" and not name.startswith(("unet", "transformer")):
            files[name] = {k: v for k, v in json.loads(files[name]).items() if k != "_name_or_path"}
    return files


def test_opens_and_saves_unchanged(artifact: Path, tmp_path: Path) -> None:
    expected = prediction(load_quantized(artifact).unet)
    opened: Any = DiffusionPipeline.from_pretrained(artifact)
    assert type(opened) is DDIMPipeline
    assert torch.equal(prediction(opened.unet), expected)
    assert all(isinstance(layer.weight_quantizer, PackedWeight) for layer in quant_layers(opened.unet).values())
    assert not any(p.requires_grad or p.is_meta for p in opened.unet.parameters())
    assert opened.unet.state_dict().keys() == load_quantized(artifact).unet.state_dict().keys()
    opened.save_pretrained(tmp_path / "again")
    load_quantized(artifact).save_pretrained(tmp_path / "loaded")
    load_quantized(artifact, packed=False).save_pretrained(tmp_path / "unpacked")
    for name in ("again", "loaded", "unpacked"):
        for file in ("config.json", WEIGHTS):
            assert (tmp_path / name / "unet" / file).read_bytes() == (artifact / "unet" / file).read_bytes()
        assert torch.equal(prediction(load_quantized(tmp_path / name).unet), expected)
        assert torch.equal(prediction(DiffusionPipeline.from_pretrained(tmp_path / name).unet), expected)


def test_denoiser_alone(artifact: Path, tmp_path: Path) -> None:
    expected = prediction(load_quantized(artifact).unet)
    for options in ({}, {"device_map": "cpu"}):
        denoiser: Any = UNet2DModel.from_pretrained(artifact, subfolder="unet", **options)
        assert torch.equal(prediction(denoiser), expected)
    denoiser.save_pretrained(tmp_path / "alone")
    assert torch.equal(prediction(UNet2DModel.from_pretrained(tmp_path / "alone")), expected)
    assert (tmp_path / "alone" / WEIGHTS).read_bytes() == (artifact / "unet" / WEIGHTS).read_bytes()


def make_shipped(name: str, directory: Path) -> Any:
    return open_pipeline(name)


def make_stable_diffusion(name: str, directory: Path) -> Any:
    pytest.importorskip("transformers")
    directory.mkdir()
    return make_text_model(name, directory)


MODELS: list[tuple[str, Callable[[str, Path], Any], dict[str, Any]]] = [
    ("fashion-mnist-ddpm", make_shipped, {"batch_size": 1}),
    ("fashion-mnist-latent", make_shipped, {"class_labels": [3]}),
    ("fashion-mnist-dit", make_shipped, {"class_labels": [3]}),
    ("Stable Diffusion", make_stable_diffusion, {"prompt": "a boot"}),
]


@pytest.mark.parametrize(("name", "make", "arguments"), MODELS)
def test_every_family(name: str, make: Callable[[str, Path], Any], arguments: dict[str, Any], tmp_path: Path) -> None:
    pipeline = make(name, tmp_path / "files")
    component, denoiser = find_denoiser(pipeline)
    save_artifact(pipeline, component, frozen(denoiser), tmp_path / "a", {})

    def images(opened: Any) -> Any:
        opened.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return opened(**arguments, num_inference_steps=2, generator=generator, output_type="np").images

    expected = images(load_quantized(tmp_path / "a"))
    assert expected.std() > 0
    opened: Any = DiffusionPipeline.from_pretrained(tmp_path / "a")
    assert type(opened) is type(pipeline)
    assert (images(opened) == expected).all()
    opened.save_pretrained(tmp_path / "b")
    assert content(tmp_path / "b") == content(tmp_path / "a")
    assert (images(load_quantized(tmp_path / "b")) == expected).all()
    if name == "Stable Diffusion":
        assert type(StableDiffusionPipeline.from_pretrained(tmp_path / "b")) is StableDiffusionPipeline


def test_narrow_types(tmp_path: Path) -> None:
    pipeline = DDIMPipeline(frozen(tiny_unet().to(torch.bfloat16)), DDIMScheduler())
    save_artifact(pipeline, "unet", pipeline.unet, tmp_path / "a", {})
    x, t = torch.randn(2, 1, 8, 8).bfloat16(), torch.tensor([30, 900])
    expected = load_quantized(tmp_path / "a").unet(x, t).sample
    opened: Any = DDIMPipeline.from_pretrained(tmp_path / "a")
    assert expected.dtype is torch.bfloat16
    assert torch.equal(opened.unet(x, t).sample, expected)
    opened.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b/unet" / WEIGHTS).read_bytes() == (tmp_path / "a/unet" / WEIGHTS).read_bytes()


def test_type_that_is_asked_for(artifact: Path, tmp_path: Path) -> None:
    opened: Any = UNet2DModel.from_pretrained(artifact, subfolder="unet", torch_dtype=torch.bfloat16)
    full = prediction(load_quantized(artifact).unet)
    assert opened.conv_norm_out.weight.dtype is torch.bfloat16
    assert 0 < (prediction(opened).float() - full).norm() < 0.05 * full.norm()
    with pytest.raises(UserError, match="own type"):
        opened.save_pretrained(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_copy_saves_itself(artifact: Path, tmp_path: Path) -> None:
    original: Any = load_quantized(artifact).unet
    copied = copy.deepcopy(original)
    copied.conv_out.weight_quantizer.scale.mul_(2)
    copied.save_pretrained(tmp_path / "copied")
    original.save_pretrained(tmp_path / "original")
    assert torch.equal(prediction(UNet2DModel.from_pretrained(tmp_path / "copied")), prediction(copied))
    assert torch.equal(prediction(UNet2DModel.from_pretrained(tmp_path / "original")), prediction(original))
    assert not torch.equal(prediction(copied), prediction(original))


def test_saving_over_an_artifact_forgets_its_checksums(artifact: Path) -> None:
    pipeline = load_quantized(artifact)
    expected = prediction(pipeline.unet)
    pipeline.save_pretrained(artifact)
    assert not (artifact / "checksums.json").exists()
    assert torch.equal(prediction(load_quantized(artifact).unet), expected)


def test_what_was_saved_by_diffusers_is_checked_too(artifact: Path, tmp_path: Path) -> None:
    load_quantized(artifact).save_pretrained(tmp_path / "b")
    for name in ("config.json", WEIGHTS, "checksums.json"):
        file = tmp_path / "b" / "unet" / name
        intact = file.read_bytes()
        file.write_bytes(intact[:200] + bytes([intact[200] ^ 4]) + intact[201:])
        with pytest.raises(UserError) as caught:
            load_quantized(tmp_path / "b")
        assert name in str(caught.value)
        file.write_bytes(intact)
        file.unlink()
        with pytest.raises(UserError, match=r"missing"):
            load_quantized(tmp_path / "b")
        file.write_bytes(intact)
    load_quantized(tmp_path / "b")


def test_damage_and_other_versions_are_refused_by_from_pretrained(artifact: Path) -> None:
    weights, config = artifact / "unet" / WEIGHTS, artifact / "unet/config.json"
    intact, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(intact[:-1] + bytes([intact[-1] ^ 4]))
    with pytest.raises(UserError, match=r"safetensors is damaged: expected SHA-256"):
        DDIMPipeline.from_pretrained(artifact)
    weights.unlink()
    with pytest.raises(OSError, match=WEIGHTS):
        DDIMPipeline.from_pretrained(artifact, use_safetensors=True)
    weights.write_bytes(intact)
    settings["quantization_config"]["version"] = 9
    config.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"version 1 or 2, got \('tcaq', 9\)"):
        DDIMPipeline.from_pretrained(artifact)
    settings["quantization_config"].update(version=1, timestep_boundaries=[1.0])
    config.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"config.json is damaged"):
        DDIMPipeline.from_pretrained(artifact)
    del settings["quantization_config"][DIGEST]  # as the first release wrote it
    config.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="elements"):
        DDIMPipeline.from_pretrained(artifact)


def test_weights_are_one_file_whatever_is_asked_for(artifact: Path, tmp_path: Path) -> None:
    unet = load_quantized(artifact).unet
    unet.save_pretrained(tmp_path / "copy", max_shard_size="5KB")
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["checksums.json", "config.json", WEIGHTS]
    with pytest.raises(UserError, match="variant: expected None, got 'fp16'"):
        unet.save_pretrained(artifact / "unet", variant="fp16")
    load_quantized(artifact)


def test_the_method_of_the_class_cannot_save_a_frozen_denoiser(artifact: Path, tmp_path: Path) -> None:
    unet = load_quantized(artifact).unet
    with pytest.raises(UserError, match="expected the method of a denoiser that was opened in this process"):
        type(unet).save_pretrained(unet, tmp_path / "copy")


def test_threads_may_save_at_once(artifact: Path, tmp_path: Path) -> None:
    unet = load_quantized(artifact).unet
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: unet.save_pretrained(tmp_path / str(number)), range(8)))
    expected = (artifact / "unet" / WEIGHTS).read_bytes()
    assert all((tmp_path / str(number) / WEIGHTS).read_bytes() == expected for number in range(8))


def test_saved_from_within_its_own_folder(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = load_quantized(artifact).unet
    (artifact / "unet" / "notes.txt").write_text("not of the artifact")
    monkeypatch.chdir(artifact / "unet")
    unet.save_pretrained(".")
    assert not (artifact / "checksums.json").exists()
    (artifact / "unet" / "notes.txt").write_text("changed")
    load_quantized(artifact)
    pipeline = DDIMPipeline(frozen(tiny_unet()), DDIMScheduler())
    save_artifact(pipeline, "unet", pipeline.unet, artifact, {})  # takes it for the artifact that it is


def test_tables_that_do_not_fit_are_one_line(artifact: Path) -> None:
    file = artifact / "unet" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["attentions"]
    del config["quantization_config"][DIGEST]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="its tables do not fit UNet2DModel"):
        UNet2DModel.from_pretrained(artifact / "unet")


def damages() -> list[Callable[[dict[str, Any]], Any]]:
    """What can happen to a config.json, whose values would all be taken otherwise, or fail late."""

    def layer(**values: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda c: c["quantization_config"]["layers"]["conv_in"].update(values)

    return [
        layer(activation_bits=4),
        layer(activation_bits=8.0),
        layer(weight_bits=True),
        layer(kept="no"),
        layer(symmetric=0),
        layer(kind="Linear"),
        layer(weight_format="fp17"),
        layer(input_quantizer="none"),
        layer(input_of="nowhere"),
        lambda c: c["quantization_config"].update(timestep_boundaries=[float("nan")] * 2),
        lambda c: c["quantization_config"]["timestep_boundaries"].reverse(),
        lambda c: c["quantization_config"].update(timestep_boundaries=["30", "60"]),
        lambda c: c["quantization_config"].update(layers=[]),
        lambda c: c["quantization_config"].update(dtypes={"": "int8"}),
        lambda c: c["quantization_config"].update(sha256="0" * 64),
        lambda c: c.update(norm_eps=1e-3),
        lambda c: c.update(sample_size=16),
        lambda c: c.pop("act_fn"),
    ]


@pytest.mark.parametrize("digest", [True, False], ids=["with checksum", "first release"])
def test_every_change_of_a_table_is_refused(artifact: Path, digest: bool) -> None:
    file = artifact / "unet" / "config.json"
    intact = file.read_text()
    for number, damage in enumerate(damages()[: None if digest else -3]):
        config = json.loads(intact)
        damage(config)
        if not digest:
            if number == 0:  # of one tensor's width nothing else tells
                continue
            del config["quantization_config"][DIGEST]
        file.write_text(json.dumps(config))
        with pytest.raises((UserError, ValueError)) as raised:
            UNet2DModel.from_pretrained(artifact / "unet")
        assert "\n" not in str(raised.value)
    file.write_text(intact)
    UNet2DModel.from_pretrained(artifact / "unet")


def test_never_pickles_and_never_quantizes(artifact: Path, tmp_path: Path) -> None:
    from tcaq_lightning.artifact.diffusers_quantizer import TCAQConfig

    with pytest.raises(UserError, match="safe_serialization"):
        load_quantized(artifact).save_pretrained(tmp_path / "b", safe_serialization=False)
    assert not list(tmp_path.rglob("*.bin"))
    tiny_unet().save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="pre-quantized"):
        UNet2DModel.from_pretrained(tmp_path / "full", quantization_config=TCAQConfig(quant_method="tcaq", version=1))


def test_accelerate_is_named_where_it_is_missing(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.import_utils.is_accelerate_available", lambda: False)
    with pytest.raises(ImportError, match="pip install accelerate"):
        DDIMPipeline.from_pretrained(artifact)
