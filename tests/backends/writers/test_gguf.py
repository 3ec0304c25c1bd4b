"""GGUF files, opened by the gguf package's reader and by diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
from numpy.typing import NDArray

from tcaq_lightning.__main__ import main
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.backends.writers.base import split
from tcaq_lightning.backends.writers.gguf import FILE_TYPES, GGUF
from tcaq_lightning.config import LayerRule
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.quantizers import FORMATS
from tests.backends.writers.conftest import flux_call, tiny_flux, weight_only

gguf = pytest.importorskip("gguf", reason="the gguf package reads these files: pip install 'tcaq-lightning[gguf]'")


def export(*arguments: object) -> int:
    return main([str(a) for a in ("export", *arguments, "--format", "gguf")])


def decoded(file: Path) -> dict[str, NDArray[np.float32]]:
    """All tensors of a file, by the gguf package."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = values.reshape([int(size) for size in reversed(tensor.shape)])
    return found


@pytest.mark.parametrize(
    "name", [name if name in ("q5_1", "q4_0") else pytest.param(name, marks=pytest.mark.slow) for name in FILE_TYPES]
)
def test_a_reader_finds_the_weights_of_our_simulation_to_the_bit(
    name: str, artifact_of: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = artifact_of(FORMATS[name].widths[0], name)
    assert export(artifact, tmp_path / "out") == 0
    file = tmp_path / "out" / "denoiser.gguf"
    tensors = decoded(file)
    unet: Any = load_quantized(artifact).unet
    layers = quant_layers(unet)
    stored = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    blocks = {layer for layer in layers if stored[f"{layer}.weight"].name == name.upper()}
    assert blocks == {n for n, layer in layers.items() if layer.spec.kind == "Linear" and layer.in_features % 32 == 0}
    assert len(blocks) > 10
    for layer, module in layers.items():
        expected = module.weight_quantizer(torch.ones(1)).numpy()
        assert np.array_equal(tensors[f"{layer}.weight"], expected)
        bias = module.bias + (0 if module.bias_shift is None else module.bias_shift[0])
        assert np.array_equal(tensors[f"{layer}.bias"], bias.numpy())
    plain = {n: p for n, p in unet.named_parameters() if ".".join(n.split(".")[:-1]) not in layers}
    assert set(tensors) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")} | set(plain)
    for key, parameter in plain.items():
        assert np.array_equal(tensors[key], parameter.numpy())


def test_blocks_take_as_many_bytes_as_the_format_says(artifact_of: Callable[..., Path], tmp_path: Path) -> None:
    assert export(artifact_of(4, "q4_0"), tmp_path / "a.gguf") == 0
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        bits = 4.5 if tensor.tensor_type.name == "Q4_0" else 32
        assert tensor.n_bytes * 8 == bits * tensor.n_elements


@pytest.mark.parametrize(("name", "error"), [("q8_0", 1e-3), ("q5_1", 1e-3), ("q4_0", 1e-3)])
def test_diffusers_predicts_what_our_simulation_does(name: str, error: float, tmp_path: Path) -> None:
    """diffusers decodes d q in float16, so that two figures in a thousand may differ by a unit of it."""
    rules = [LayerRule("x_embedder", weight_bits=8, weight_format="q8_0")]  # of 4 inputs: written in float
    ours = weight_only(tiny_flux(), FORMATS[name].widths[0], name, rules=rules)
    writer, file = GGUF(), tmp_path / "flux.gguf"
    checkpoint = split(ours, writer)
    assert list(checkpoint.kept) == ["x_embedder"]
    writer.write(ours, checkpoint, file)
    ours.save_config(tmp_path / "config")
    theirs = FluxTransformer2DModel.from_single_file(
        str(file),
        config=str(tmp_path / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    assert type(theirs.transformer_blocks[0].attn.to_q).__name__ == "GGUFLinear"
    expected = flux_call(ours)
    difference = (flux_call(theirs) - expected).norm() / expected.norm()
    assert float(difference) < error
    full = (flux_call(tiny_flux()) - expected).norm() / expected.norm()
    assert float(full) > 3 * float(difference)  # a right file is told from a full-precision one


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"bits": 4, "name": "nvfp4"}, "its number format is nvfp4; expected quantization.weight.format one of q4_0"),
        ({"bits": 4, "name": "q4_0", "activation_bits": 8}, "calibrate with quantization.activation.bits: 16"),
    ],
)
def test_what_no_file_can_hold_is_refused(
    weight: dict[str, Any],
    message: str,
    artifact_of: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export(artifact_of(**weight), tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_layers_in_float_are_listed_or_refused(
    artifact_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = artifact_of(8, "q8_0")
    assert export(artifact, tmp_path / "out") == 0
    assert "in float: conv_in: readers take codes of linear layers alone" in capsys.readouterr().out
    assert export(artifact, tmp_path / "strict", "--strict", "true") == 2
    assert "conv_in: readers take codes of linear layers alone" in capsys.readouterr().err
    assert export(artifact, tmp_path / "wrong.onnx") == 2
    assert not (tmp_path / "strict").exists()


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from tcaq_lightning.errors import UserError

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'tcaq-lightning\[gguf\]'"):
        GGUF().check()
