from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tcaq_lightning.__main__ import main
from tcaq_lightning.backends import export as command
from tcaq_lightning.backends import placement
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.backends.kernels import SATURATION, Kernel
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.backends.saturation import sums_saturate
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import Sizes
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.quantizers.packing import packed_size

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


def run(*arguments: object) -> int:
    return main([str(a) for a in ("export", *arguments, "--threads", 1)])


def test_onnx_holds_the_artifacts_integers(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(artifact, "--format", "onnx", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    every = len(quant_layers(load_quantized(artifact).unet)) + 2  # and two matmuls of the attention
    record = json.loads((tmp_path / "out" / "denoiser.json").read_text())
    rows = record["engines"]["openvino"]["kernels"]
    assert len(rows) == every
    assert all(row["integer"] or (sums_saturate() and row["reason"] == SATURATION) for row in rows)
    count = sum(row["integer"] for row in rows)
    assert "stored as int4" in printed
    assert f"openvino: {count} of {every} quantized products on integer kernels" in printed
    model = onnx.load(tmp_path / "out" / "denoiser.onnx")
    constants = {t.name: t for t in model.graph.initializer}
    layers = quant_layers(load_quantized(artifact).unet)
    for name, layer in layers.items():
        tensor = constants[f"denoiser.{name}.codes"]
        assert tensor.data_type == onnx.TensorProto.INT4
        assert len(tensor.raw_data) == packed_size(layer.weight_quantizer.codes.numel(), 4)
        codes = onnx.numpy_helper.to_array(tensor).astype("int8")
        stored = torch.from_numpy(codes if codes.ndim == 4 else codes.T.copy())
        assert torch.equal(stored, (layer.weight_quantizer.codes.int() - 8).to(torch.int8))
    assert set(record["engines"]) == {"onnxruntime", "openvino"}
    assert record["inputs"] == {"sample": ["B", 1, 8, 8], "timestep": ["B"]}


@pytest.mark.slow
def test_a_written_file_is_opened_by_load_quantized(artifact: Path, tmp_path: Path) -> None:
    assert run(artifact, "--format", "openvino", tmp_path / "a.xml", "--four_bit", "false") == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.bin", "a.json", "a.xml"]
    loaded = load_quantized(artifact, backend="openvino", model=tmp_path / "a.xml", threads=1)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 99])
    expected = load_quantized(artifact).unet(x, t).sample
    assert (loaded.unet(x, t).sample - expected).square().sum() / expected.square().sum() < 5e-3
    with pytest.raises(UserError, match="exported from another artifact"):
        command.open_engine("openvino", tmp_path / "a.xml", None, {}, "another digest")


@pytest.mark.slow
def test_nothing_is_left_of_a_failure(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fell_back(engine: Any) -> list[Kernel]:
        return [Kernel(p, "Convolution jit_avx2_f32", "f32", False, "") for p in engine.info.products]

    monkeypatch.setattr("tcaq_lightning.backends.openvino.OpenVINOEngine.kernels", fell_back)
    output = tmp_path / "new" / "out"
    assert run(artifact, "--format", "openvino", output) == 2
    message = capsys.readouterr().err
    assert "quantized products in float, such as" in message
    assert message.count("\n") == 1
    assert not output.parent.exists()
    assert run(artifact, "--format", "openvino", output, "--allow_float", "true") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx", "out.xml"], "ends in .onnx"),
        (["--format", "onnx", "taken/out"], "can be written"),
        (["--format", "tflite", "out"], "tflite"),
        (["--latents", "[6,0]", "out"], "--latents: expected a height and a width"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("")
    assert run(artifact, *arguments) == 2
    assert message in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["taken"]


def test_sizes_that_a_denoiser_does_not_take(frozen: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="latents: a UNet2DModel takes no samples of 7 x 7"):
        build_graph(frozen(levels=2), "digest", Sizes(latents=(7, 7)))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "unet/config.json",
            lambda b: b.replace(b'"version": 1', b'"version": 9'),
            "expected quant_method 'tcaq' and version 1 or 2",
        ),
        ("unet/config.json", lambda b: b[:-20], "is damaged"),
        ("unet/diffusion_pytorch_model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "is damaged"),
        ("checksums.json", lambda b: b[1:], "is damaged"),
        ("model_index.json", lambda _: b"{}", "names no denoiser"),
    ],
)
def test_other_and_damaged_artifacts(
    file: str,
    change: Callable[[bytes], bytes],
    message: str,
    artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / file).write_bytes(change((artifact / file).read_bytes()))
    assert run(tmp_path / "copy", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("package", "graph_format"), [("onnx", "onnx"), ("openvino", "openvino")])
def test_an_engine_that_is_not_installed(
    package: str,
    graph_format: str,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run(artifact, "--format", graph_format, tmp_path / "out") == 2
    assert f"pip install 'tcaq-lightning[{package}]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_operator_that_onnx_lacks(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line, and not the exporter's dump of the whole graph, which it writes past Python's stdout."""
    monkeypatch.setattr(
        "tcaq_lightning.backends.graph.layers.GraphLinear.product", lambda _, codes: torch.linalg.pinv(codes)
    )
    assert run(artifact, tmp_path / "out") == 2
    printed = capfd.readouterr()
    assert "cannot export a UNet2DModel: expected operators that ONNX opset 21 has" in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", [1, 2])
def test_nothing_half_written_is_left_of_an_interruption(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    for folder, text in ((scratch, "new"), (out, "old")):
        folder.mkdir()
        for name in ("denoiser.onnx", "denoiser.json"):
            (folder / name).write_text(text)
    copies = []

    def interrupted(source: Path, target: Path) -> None:
        copies.append(target)
        Path(target).write_text("ha")
        if len(copies) == moment:
            raise KeyboardInterrupt

    monkeypatch.setattr(placement.shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        placement.put_in_place(scratch, out)
    assert {f.name: f.read_text() for f in out.iterdir()} == {"denoiser.onnx": "old", "denoiser.json": "old"}


def test_a_full_precision_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fashion-mnist-ddpm", tmp_path / "out") == 2
    assert "expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
