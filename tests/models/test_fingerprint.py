from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler

from tcaq_lightning.models.fingerprint import component_hash, pipeline_hashes
from tcaq_lightning.models.pipelines import open_pipeline


@pytest.fixture
def pipeline(make_unet: Any) -> DDIMPipeline:
    return DDIMPipeline(copy.deepcopy(make_unet(attention=False)), DDIMScheduler(clip_sample=False))


def test_what_is_opened_again_hashes_equally(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "whole")
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1
    expected = pipeline_hashes(pipeline)
    assert set(expected) == {"pipeline", "unet", "scheduler"}
    for name in ("whole", "shards"):
        assert pipeline_hashes(open_pipeline(str(tmp_path / name))) == expected


@pytest.mark.parametrize("change", ["weight", "buffer type", "settings", "scheduler", "scheduler class"])
def test_what_has_changed_hashes_otherwise(pipeline: DDIMPipeline, change: str) -> None:
    before = pipeline_hashes(pipeline)
    if change == "weight":
        with torch.no_grad():
            pipeline.unet.conv_in.bias[0] += 1e-6
    elif change == "buffer type":
        pipeline.unet.conv_in.bias.data = pipeline.unet.conv_in.bias.data.double()
    elif change == "settings":
        pipeline.unet.register_to_config(center_input_sample=True)
    elif change == "scheduler":
        pipeline.scheduler = DDIMScheduler(clip_sample=True)
    else:
        pipeline.scheduler = DDPMScheduler(clip_sample=False)
    after = pipeline_hashes(pipeline)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"scheduler" if "scheduler" in change else "unet"}


def test_tokenizers_hash_by_what_they_would_save(tmp_path: Path) -> None:
    text_models = pytest.importorskip("tests.text_models")
    first, second = (tmp_path / name for name in ("a", "b"))
    for directory in (first, second):
        directory.mkdir()
    one, two = (text_models.clip_tokenizer(directory) for directory in (first, second))
    assert component_hash(one) == component_hash(two)
    two.add_tokens(["<garment>"])
    assert component_hash(one) != component_hash(two)


def test_an_object_of_no_library_hashes_by_its_class() -> None:
    """Its `repr` would tell where it lies in memory, which differs in each process."""

    class Helper: ...

    assert component_hash(Helper()) == component_hash(Helper())
    assert component_hash(True) != component_hash(False)
