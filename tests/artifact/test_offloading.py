"""Offloading of an artifact's denoiser: whatever part of it is elsewhere between calls, the same bits come out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.errors import UserError
from tests.artifacts import save_denoiser
from tests.families import make_denoiser, make_family

CPU = torch.device("cpu")
FAMILIES = ("Stable Diffusion 1", "added_kv", "PixArt", "SD3.5", "Flux")
Way = Callable[[Any, Path], Any]
WAYS: dict[str, Way] = {
    "layer by layer": lambda d, _: accelerate.cpu_offload(d, CPU),
    "buffers too": lambda d, _: accelerate.cpu_offload(d, CPU, offload_buffers=True),
    "to a file": lambda d, path: accelerate.disk_offload(d, path, CPU, offload_buffers=True),
    "as a whole": lambda d, _: accelerate.cpu_offload_with_hook(d, CPU),
    "groups of layers": lambda d, _: d.enable_group_offload(CPU, CPU, "leaf_level"),
    "groups of blocks": lambda d, _: d.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1),
    "layers to files": lambda d, path: d.enable_group_offload(CPU, CPU, "leaf_level", offload_to_disk_path=str(path)),
    "blocks to files": lambda d, path: d.enable_group_offload(
        CPU, CPU, num_blocks_per_group=1, offload_to_disk_path=str(path)
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_offloaded_denoisers_compute_the_same_bits(name: str, tmp_path: Path) -> None:
    family = make_family(name)
    save_denoiser(make_denoiser(name), tmp_path / "a")
    expected = family.predict(load_quantized(tmp_path / "a").unet)
    for number, (way, offload) in enumerate(WAYS.items()):
        denoiser: Any = load_quantized(tmp_path / "a").unet
        offload(denoiser, tmp_path / str(number))
        assert torch.equal(family.predict(denoiser), expected), way
        assert torch.equal(family.predict(denoiser), expected), way


@pytest.mark.parametrize("way", ["buffers too", "groups of layers", "layers to files"])
def test_with_adapters_too(way: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    family = make_family("Flux")
    save_denoiser(make_denoiser("Flux"), tmp_path / "a")
    denoiser: Any = load_quantized(tmp_path / "a").unet
    denoiser.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "add_k_proj"], init_lora_weights=False))
    expected = family.predict(denoiser)
    WAYS[way](denoiser, tmp_path / "files")
    assert torch.equal(family.predict(denoiser), expected)


@pytest.mark.parametrize("way", ["layer by layer", "to a file", "blocks to files"])
def test_what_is_not_at_hand_is_not_saved(way: str, tmp_path: Path) -> None:
    save_denoiser(make_denoiser("Stable Diffusion 1"), tmp_path / "a")
    denoiser: Any = load_quantized(tmp_path / "a").unet
    WAYS[way](denoiser, tmp_path / "files")
    with pytest.raises(UserError, match="save_pretrained: the denoiser is offloaded"):
        denoiser.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("way", ["as a whole", "groups of layers", "groups of blocks"])
def test_what_is_in_memory_is_saved(way: str, tmp_path: Path) -> None:
    save_denoiser(make_denoiser("Stable Diffusion 1"), tmp_path / "a")
    denoiser: Any = load_quantized(tmp_path / "a").unet
    WAYS[way](denoiser, tmp_path / "files")
    denoiser.save_pretrained(tmp_path / "b")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a/unet" / file).read_bytes()
