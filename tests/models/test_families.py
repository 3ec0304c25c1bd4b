from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tcaq_lightning.config import Role
from tcaq_lightning.models.families import (
    FAMILIES,
    LAYERS_WITH_WEIGHTS,
    Family,
    GenericFamily,
    family_of,
    inner_output_layer,
)
from tcaq_lightning.models.unets import FixedHeadsUNet2DModel
from tcaq_lightning.models.units import find_units
from tests.families import FAMILIES as DENOISERS

TIME_TEXT = [f"time_text_embed.{part}_embedder.linear_{i}" for part in ("timestep", "text") for i in (1, 2)]
GUIDANCE = [f"time_text_embed.guidance_embedder.linear_{i}" for i in (1, 2)]
TWO_STREAMS = ("transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1_context.linear", "norm_out.linear")
EXPECTED: dict[str, dict[Role, list[str]]] = {
    "UNet2DModel": {
        "input": ["conv_in"],
        "output": ["conv_out"],
        "time": ["time_embedding.linear_1", "mid_block.resnets.1.time_emb_proj"],
        "shortcut": ["up_blocks.0.resnets.1.conv_shortcut"],
        "block": ["mid_block.resnets.0.conv2", "mid_block.attentions.0.to_q", "down_blocks.0.downsamplers.0.conv"],
    },
    "SDXL": {
        "input": ["conv_in"],
        "output": ["conv_out"],
        "time": ["time_embedding.linear_2", "add_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"],
        "shortcut": ["up_blocks.1.resnets.0.conv_shortcut"],
        "block": ["mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out"],
    },
    "DiT": {
        "input": ["pos_embed.proj"],
        "output": ["proj_out_2"],
        "time": ["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1"],
        "modulation": ["transformer_blocks.0.norm1.linear", "proj_out_1"],
        "block": ["transformer_blocks.0.ff.net.2", "transformer_blocks.1.attn1.to_out.0"],
    },
    "PixArt, sizes": {
        "input": ["pos_embed.proj", "caption_projection.linear_1"],
        "output": ["proj_out"],
        "time": ["adaln_single.emb.timestep_embedder.linear_1", "adaln_single.emb.resolution_embedder.linear_2"],
        "modulation": ["adaln_single.linear"],
        "block": ["transformer_blocks.0.attn2.to_k"],
    },
    "SD3": {
        "input": ["pos_embed.proj", "context_embedder"],
        "output": ["proj_out"],
        "time": TIME_TEXT,
        "modulation": [*TWO_STREAMS],
        "block": ["transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.ff_context.net.2"],
    },
    "Flux": {
        "input": ["x_embedder", "context_embedder"],
        "output": ["proj_out"],
        "time": [*TIME_TEXT, *GUIDANCE],
        "modulation": [*TWO_STREAMS, "single_transformer_blocks.0.norm.linear"],
        "block": ["single_transformer_blocks.0.proj_out", "single_transformer_blocks.0.proj_mlp"],
    },
}


def layer_roles(denoiser: nn.Module, family: Family) -> dict[str, Role]:
    """Roles of the layers with weights."""
    roles = family.roles_of(denoiser)
    return {n: roles[n] for n, m in denoiser.named_modules() if isinstance(m, LAYERS_WITH_WEIGHTS)}


@pytest.mark.parametrize("name", EXPECTED)
def test_roles_of_a_familys_layers(name: str) -> None:
    denoiser = DENOISERS[name]()
    roles = layer_roles(denoiser, family_of(denoiser))
    for role, layers in EXPECTED[name].items():
        assert {layer: roles[layer] for layer in layers} == dict.fromkeys(layers, role)
    assert set(roles.values()) == set(EXPECTED[name])
    counted = [role for role in roles.values() if role in ("input", "output")]
    assert len(counted) == len(EXPECTED[name]["input"]) + len(EXPECTED[name]["output"]) + (
        "caption_projection.linear_2" in roles
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_diffusers_names_alone_tell_nearly_as_much(name: str) -> None:
    """A family that is missing costs little: only the text projections of PixArt go unseen."""
    denoiser = DENOISERS[name]()
    known, guessed = (layer_roles(denoiser, family) for family in (family_of(denoiser), GenericFamily()))
    differing = {layer for layer, role in known.items() if guessed[layer] != role}
    assert all(layer.startswith("caption_projection.") for layer in differing)


def test_a_subclass_of_a_denoiser_belongs_to_its_family() -> None:
    unet = FixedHeadsUNet2DModel(sample_size=8, block_out_channels=(32, 64), num_attention_heads=4)
    assert type(family_of(unet)) is FAMILIES["UNet2DModel"]


class Stage(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.to_time = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(torch.relu(self.fc1(x) + self.to_time(t)))
        return y


class Staged(nn.Module):
    """A denoiser that diffusers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 4)
        self.stages = nn.ModuleList(Stage(4) for _ in range(2))
        self.head = nn.Linear(4, 2)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FAMILIES, "_parts", dict(FAMILIES.items()))

    @FAMILIES.register("Staged")
    class StagedFamily(Family):
        blocks: ClassVar[dict[type[nn.Module], Any]] = {Stage: "fc2"}
        roles: ClassVar[dict[Role, tuple[str, ...]]] = {"input": ("stem",), "time": ("*.to_time",)}


@pytest.mark.usefixtures("registered")
def test_a_stranger_adds_a_family_from_outside() -> None:
    denoiser = Staged()
    assert find_units(denoiser) == ["stem", "stages.0", "stages.1", "head"]
    assert inner_output_layer(denoiser.stages[0]) == "fc2"
    roles = family_of(denoiser).roles_of(denoiser)
    assert [n for n, role in roles.items() if role != "block"] == ["stem", "stages.0.to_time", "stages.1.to_time"]


def test_without_a_family_the_first_and_the_last_layer_are_input_and_output() -> None:
    denoiser = Staged()
    assert find_units(denoiser)[1:3] == ["stages.0.fc1", "stages.0.fc2"]
    assert inner_output_layer(denoiser.stages[0]) is None
    roles = family_of(denoiser).roles_of(denoiser)
    assert {n: role for n, role in roles.items() if role != "block"} == {"stem": "input", "head": "output"}
