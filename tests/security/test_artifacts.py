"""Artifacts that were changed on purpose, so that their checksums fit, are refused before anything large is built."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzz import Subject
from tcaq_lightning.artifact.directory import open_artifact, write_checksums
from tcaq_lightning.errors import UserError

LARGE = 10**12


def set_layer(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["quantization_config"]["layers"]["conv_in"].update(changes)


CHANGES: list[Callable[[dict[str, Any]], object]] = [
    lambda c: c.update(layers_per_block=LARGE),
    lambda c: c.update(layers_per_block=10**5),
    lambda c: c.update(block_out_channels=[LARGE]),
    lambda c: c.update(block_out_channels=[2**20]),
    lambda c: c.update(in_channels=2**23),
    lambda c: c.update(in_channels=float("inf")),
    lambda c: c.update(down_block_types=["DownBlock2D"] * 10_000, block_out_channels=[16] * 10_000),
    lambda c: c.update(norm_num_groups=0),
    lambda c: c.update(norm_num_groups=None),
    lambda c: c.update(block_out_channels={}),
    lambda c: c.update(_class_name="eval"),
    lambda c: c.update(_class_name=["UNet2DModel"]),
    lambda c: c["quantization_config"].update(layers=[]),
    lambda c: c["quantization_config"].update(layers={}),
    lambda c: c["quantization_config"].update(attentions=None),
    lambda c: c["quantization_config"].update(timestep_boundaries=[float("nan")]),
    lambda c: c["quantization_config"].update(timestep_boundaries=[2, 1]),
    lambda c: c["quantization_config"].update(timestep_boundaries=[True]),
    lambda c: c["quantization_config"].update(dtypes={"": "save"}),
    lambda c: c["quantization_config"].update(component_dtypes={"vae": "load"}),
    lambda c: c["quantization_config"].update(component_dtypes=[1]),
    set_layer(weight_bits=0),
    set_layer(weight_bits=10**9),
    set_layer(weight_bits=4.0),
    set_layer(activation_bits="4"),
    set_layer(weight_granularity=0),
    set_layer(weight_granularity=-LARGE),
    set_layer(weight_format="pickle"),
    set_layer(input_quantizer="os.system"),
    set_layer(input_of="conv_in"),
    set_layer(input_of="conv_out"),
    set_layer(unknown=1),
]


@pytest.mark.parametrize("change", CHANGES)
def test_config(change: Callable[[dict[str, Any]], object], subject: Subject, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(subject.run_dir / "quantized", tmp_path / "q"))
    file = artifact / "unet" / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    write_checksums(artifact)
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        open_artifact(artifact)
    assert time.perf_counter() - began < 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "1",
        '"text"',
        "{",
        "\0",
        "[" * 100_000,
        '{"unet": ["os", "system"]}',
        '{"unet": [["diffusers"], 1]}',
    ],
)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "checksums.json"])
def test_json_of_another_shape(name: str, content: str, subject: Subject, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(subject.run_dir / "quantized", tmp_path / "q"))
    (artifact / name).write_text(content)
    if name != "checksums.json":
        write_checksums(artifact)
    with pytest.raises(UserError) as caught:
        open_artifact(artifact)
    assert "\n" not in str(caught.value)


def test_a_list_of_checksums_names_no_file_outside(subject: Subject, tmp_path: Path) -> None:
    from tcaq_lightning.artifact.diffusers_quantizer import checksums_text

    artifact = Path(shutil.copytree(subject.run_dir / "quantized", tmp_path / "q"))
    for name in ("../secret", "/etc/passwd", "unet/../../secret"):
        (artifact / "checksums.json").write_text(checksums_text({name: "0" * 64}))
        with pytest.raises(UserError, match="names of files beneath"):
            open_artifact(artifact)
