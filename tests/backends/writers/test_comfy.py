"""ComfyUI's files, decoded by hand and by comfy-kitchen where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from tcaq_lightning.__main__ import main
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.backends.writers.base import split
from tcaq_lightning.backends.writers.comfy import LAYOUTS, Comfy, tiled
from tcaq_lightning.nn.parts import quant_layers
from tests.backends.writers.conftest import flux_call, tiny_flux, weight_only

KINDS: dict[str, dict[str, Any]] = {
    "int8_tensorwise": {"bits": 8, "name": "int"},
    "awq_w4a16": {"bits": 4, "name": "int", "granularity": 16, "symmetric": False},
    "float8_e4m3fn": {"bits": 8, "name": "e4m3", "granularity": "tensor"},
    "float8_e5m2": {"bits": 8, "name": "e5m2", "granularity": "tensor"},
    "nvfp4": {"bits": 4, "name": "nvfp4"},
    "mxfp8": {"bits": 8, "name": "mxfp8"},
}
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
every_kind = pytest.mark.parametrize("kind", KINDS)


def read(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping


def scale_at(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in their order, by the formula of the layout."""
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tiles = scales.shape[1] // 4
    return scales.flatten()[((i // 128) * tiles + j // 4) * 512 + (i % 32) * 16 + (i % 128 // 32) * 4 + j % 4]


def by_hand(settings: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The weight (N, K) of a layer's tensors."""
    rows, columns = shape
    weight, scale = tensors["weight"], tensors["weight_scale"]
    kind = settings["format"]
    if kind == "awq_w4a16":
        group = settings["group_size"]
        low, high = weight.view(torch.uint8) & 15, weight.view(torch.uint8) >> 4
        codes = torch.stack([low, high], -1).flatten(1).float()
        return (codes - 8) * scale.T.repeat_interleave(group, 1) + tensors["weight_zeros"].T.repeat_interleave(group, 1)
    if kind == "nvfp4":
        values = E2M1[torch.stack([weight >> 4, weight & 15], -1).flatten(1).long()][:rows, :columns]
        blocks = scale_at(scale.float(), rows, -(-columns // 16)) * tensors["weight_scale_2"]
        return values * blocks.repeat_interleave(16, 1)[:, :columns]
    if kind == "mxfp8":
        blocks = torch.exp2(scale_at(scale.float(), rows, -(-columns // 32)) - 127)
        return weight.float()[:rows, :columns] * blocks.repeat_interleave(32, 1)[:, :columns]
    return weight.float() * scale


def by_comfy_kitchen(settings: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, int]) -> Any:
    """A tensor of that library."""
    ck = pytest.importorskip("comfy_kitchen.tensor", reason="comfy-kitchen is not installed: pip install comfy-kitchen")
    kind = settings["format"]
    layouts = {
        "int8_tensorwise": ck.TensorWiseINT8Layout,
        "awq_w4a16": ck.TensorCoreAWQW4A16Layout,
        "nvfp4": ck.TensorCoreNVFP4Layout,
        "mxfp8": ck.TensorCoreMXFP8Layout,
    }
    layout = layouts.get(kind, ck.TensorCoreFP8Layout)
    scale, more = tensors["weight_scale"], {}
    if kind == "awq_w4a16":
        more = {"zeros": tensors["weight_zeros"], "group_size": settings["group_size"]}
    if kind == "nvfp4":
        scale, more = tensors["weight_scale_2"], {"block_scale": scale}
    if kind == "mxfp8":
        scale = scale.view(torch.float8_e8m0fnu)
    params = layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=shape, **more)
    return ck.QuantizedTensor(tensors["weight"], layout.__name__, params)


def layer_tensors(tensors: dict[str, Tensor], name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    settings = json.loads(bytes(found.pop("comfy_quant").tolist()))
    return settings, found


class OddShapes(nn.Module):
    """Linear layers of sizes that are no whole blocks, and more rows and blocks than a tile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(k, n, bias=k % 2 == 0) for n, k in ((5, 70), (300, 144), (16, 33)))


@every_kind
def test_weights_are_those_of_our_simulation(kind: str, tmp_path: Path) -> None:
    from tcaq_lightning.nn.build import build_layer
    from tcaq_lightning.nn.spec import LayerSpec
    from tcaq_lightning.quantizers import CodedWeight
    from tcaq_lightning.quantizers.timestep_groups import TimestepGroups

    settings = dict(KINDS[kind])
    module: Any = OddShapes()
    for number, source in enumerate(module.layers):
        spec = LayerSpec(
            "Linear",
            weight_bits=settings["bits"],
            activation_bits=16,
            symmetric=settings.get("symmetric", True),
            input_quantizer="float",
            weight_format=settings["name"],
            weight_granularity=settings.get("granularity"),
        )
        layer = build_layer(source, spec, TimestepGroups([]), f"layers.{number}")
        layer.search_weight()
        layer.weight_quantizer = CodedWeight.from_rounded(layer.learned_weight, layer.input_quantizer.r)
        module.layers[number] = layer
    writer = Comfy()
    checkpoint = split(module, writer)
    writer.write(module, checkpoint, tmp_path / "a.safetensors")
    assert list(checkpoint.kept) == (["layers.0", "layers.2"] if kind == "awq_w4a16" else [])
    tensors = read(tmp_path / "a.safetensors")
    for name, layer in quant_layers(module).items():
        expected = layer.weight_quantizer(torch.ones(1))
        assert (f"{name}.bias" in tensors) == (layer.bias is not None)
        if name in checkpoint.kept:
            assert torch.equal(tensors[f"{name}.weight"], expected)
            continue
        found = layer_tensors(tensors, name)
        assert found[0]["format"] == kind
        assert found[0]["full_precision_matrix_mult"] is True
        tolerance = 1e-6 if kind == "awq_w4a16" else 0  # its minimum is rounded once more
        torch.testing.assert_close(by_hand(*found, tuple(expected.shape)), expected, rtol=tolerance, atol=tolerance)


@every_kind
def test_comfy_kitchen_computes_what_our_simulation_does(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: pip install comfy-kitchen")
    ours = weight_only(tiny_flux(), **KINDS[kind])
    writer = Comfy()
    checkpoint = split(ours, writer)
    writer.write(ours, checkpoint, tmp_path / "flux.safetensors")
    tensors = read(tmp_path / "flux.safetensors")
    theirs = tiny_flux()
    for name in checkpoint.held:
        layer: Any = theirs.get_submodule(name)
        quantized = by_comfy_kitchen(*layer_tensors(tensors, name), tuple(layer.weight.shape))
        weight = quantized.dequantize()[: layer.out_features, : layer.in_features]
        expected = ours.get_submodule(name).weight_quantizer(torch.ones(1))
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
        layer.weight.data.copy_(weight)
    theirs.load_state_dict(checkpoint.plain, strict=False)
    expected = flux_call(ours)
    assert float((flux_call(theirs) - expected).norm() / expected.norm()) < 1e-5
    assert len(checkpoint.held) > 10


def test_integers_by_row_run_as_comfy_kitchens_tensors(tmp_path: Path) -> None:
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: pip install comfy-kitchen")
    ours = weight_only(tiny_flux(), **KINDS["awq_w4a16"])
    writer = Comfy()
    writer.write(ours, split(ours, writer), tmp_path / "flux.safetensors")
    name = "transformer_blocks.0.attn.to_q"
    layer: Any = ours.get_submodule(name)
    found = layer_tensors(read(tmp_path / "flux.safetensors"), name)
    weight = by_comfy_kitchen(*found, (64, 64))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(F.linear(x, weight, found[1]["bias"]), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [kind if kind == "nvfp4" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_the_command_writes_every_layout(
    kind: str, artifact_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = artifact_of(**KINDS[kind])
    assert main(["export", str(artifact), str(tmp_path / "out"), "--format", "comfy"]) == 0
    assert "in float: conv_in: ComfyUI takes codes of linear layers alone" in capsys.readouterr().out
    tensors = read(tmp_path / "out" / "denoiser.safetensors")
    layers = quant_layers(load_quantized(artifact).unet)
    linear = {name for name, layer in layers.items() if layer.spec.kind == "Linear"}
    assert {key.removesuffix(".comfy_quant") for key in tensors if key.endswith(".comfy_quant")} == linear
    for name, layer in layers.items():
        expected = layer.weight_quantizer(torch.ones(1))
        if name not in linear:
            assert torch.equal(tensors[f"{name}.weight"], expected)
        else:
            found = by_hand(*layer_tensors(tensors, name), tuple(expected.shape))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_tiles_are_those_of_the_formula() -> None:
    scales = torch.arange(300 * 9).view(300, 9)
    assert tiled(scales).shape == (384, 12)
    assert torch.equal(scale_at(tiled(scales), 300, 9), scales)


def test_every_layout_is_tested() -> None:
    assert set(KINDS) == set(LAYOUTS)


def test_what_no_layout_holds_is_refused(
    artifact_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(artifact_of(4, "nf4")), str(tmp_path / "out"), "--format", "comfy"]) == 2
    printed = capsys.readouterr().err
    assert "expected quantization.weight.format nvfp4 or mxfp8" in printed
    assert len(printed.splitlines()) == 1
