"""Original names, undone by diffusers' own conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from torch import Tensor

from tcaq_lightning.backends.writers.base import Checkpoint, split
from tcaq_lightning.backends.writers.gguf import GGUF
from tcaq_lightning.backends.writers.original_names import FUSED, with_original_names
from tcaq_lightning.config import LayerRule
from tcaq_lightning.errors import UserError
from tests.backends.writers.conftest import tiny_flux, weight_only
from tests.tiny_models import tiny_unet


def flux() -> Any:
    """Of the true width, which diffusers' conversion has written into it, without memory."""
    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)


def tiny_sd3() -> Any:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def narrow(denoiser: Any) -> dict[str, Tensor]:
    """Random tensors of a denoiser's names and numbers of rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in denoiser.state_dict().items()}
    return {
        name: torch.randn(*shape[:1], *[2] * (len(shape) - 1), generator=generator) for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("make", "convert"),
    [
        (flux, convert_flux_transformer_checkpoint_to_diffusers),
        (tiny_sd3, convert_sd3_transformer_checkpoint_to_diffusers),
    ],
)
def test_diffusers_conversion_undoes_it(make: Any, convert: Any) -> None:
    denoiser = make()
    tensors = narrow(denoiser) if make is flux else dict(denoiser.state_dict())
    renamed = with_original_names(denoiser, Checkpoint(plain=tensors)).plain
    assert not set(renamed) & {name for name in tensors if "blocks" in name}
    back = convert(dict(renamed))
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def call(denoiser: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        found: Tensor = denoiser(
            torch.randn(2, 4, 8, 8, generator=generator),
            torch.randn(2, 5, 64, generator=generator),
            torch.randn(2, 64, generator=generator),
            torch.tensor([300.0, 800.0]),
            return_dict=False,
        )[0]
    return found


def test_diffusers_opens_a_gguf_file_with_original_names(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf package writes and reads these files")
    ours = weight_only(tiny_sd3(), 8, "q8_0")
    writer = GGUF()
    checkpoint = with_original_names(ours, split(ours, writer))
    assert checkpoint.held["joint_blocks.0.x_block.attn.qkv"].shape == (192, 64)
    assert checkpoint.held["final_layer.adaLN_modulation.1"].shape == (128, 64)
    writer.write(ours, checkpoint, tmp_path / "sd3.gguf")
    ours.save_config(tmp_path / "config")
    theirs = SD3Transformer2DModel.from_single_file(
        str(tmp_path / "sd3.gguf"),
        config=str(tmp_path / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    expected = call(ours)
    assert float((call(theirs) - expected).norm() / expected.norm()) < 1e-3


def test_projections_that_do_not_fit_together_stand_in_float() -> None:
    rules = [LayerRule("*.to_k", weight_bits=8, weight_format="q8_0")]
    ours = weight_only(tiny_flux(), 4, "q4_0", rules=rules)
    checkpoint = split(ours, GGUF())
    renamed = with_original_names(ours, checkpoint)
    name = "double_blocks.0.img_attn.qkv"
    assert renamed.kept[name] == FUSED
    rows = [checkpoint.held[f"transformer_blocks.0.attn.to_{x}"](torch.ones(1)) for x in "qkv"]
    assert torch.equal(renamed.plain[f"{name}.weight"], torch.cat(rows))
    assert "double_blocks.0.txt_attn.qkv" in renamed.held


def test_other_denoisers_are_refused() -> None:
    with pytest.raises(UserError, match="--names original: expected a denoiser of FluxTransformer2DModel"):
        with_original_names(tiny_unet(), Checkpoint())
    with pytest.raises(UserError, match=r"nothing is known about adapter\.weight"):
        with_original_names(tiny_flux(), Checkpoint(plain={"adapter.weight": torch.ones(1)}))
