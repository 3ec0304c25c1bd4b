"""Whatever diffusers sets on an artifact's attentions, they stay quantized, or it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor as diffusers_processors
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from tcaq_lightning.config import LayerRule
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.families import is_attention
from tcaq_lightning.nn.attention import keep_quantized, quantized_processor
from tests.artifacts import OPENERS, frozen, save_denoiser
from tests.families import Family, make_denoiser, make_family

FAMILIES = ("UNet2DModel", "Stable Diffusion 1", "added_kv", "added_kv, only cross", "DiT", "PixArt", "SD3.5", "Flux")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Family]]:
    """Directory of a family's artifact, and samples for its denoiser."""

    @cache
    def make(name: str) -> tuple[Path, Family]:
        path = tmp_path_factory.mktemp("artifact") / "quantized"
        save_denoiser(make_denoiser(name), path)
        return path, make_family(name)

    return make


def attentions(denoiser: nn.Module) -> list[Any]:
    return [module for module in denoiser.modules() if is_attention(module)]


def each(method: str, *arguments: Any) -> Callable[[Any], None]:
    """Call a method of the denoiser and of every attention that have it."""

    def change(denoiser: Any) -> None:
        for module in (denoiser, *attentions(denoiser)):
            if hasattr(module, method):
                getattr(module, method)(*arguments)

    return change


def set_equivalents(denoiser: Any) -> None:
    """Every processor of diffusers that computes what an attention's own does."""
    for attention in attentions(denoiser):
        own = attention.processor
        for name in (own.spec.processor, *(() if getattr(attention, "norm_q", None) is not None else own.variants)):
            kind = FluxAttnProcessor if name == "FluxAttnProcessor" else getattr(diffusers_processors, name)
            arguments = (1,) if name.startswith("Sliced") else (None,) if name.startswith("XFormers") else ()
            attention.processor = kind(*arguments)
            attention.set_processor(kind(*arguments))


def set_its_own(denoiser: Any) -> None:
    """Set what is there already, one by one and all of them."""
    for attention in attentions(denoiser):
        attention.set_processor(attention.processor)
        attention.processor = attention.get_processor()
    if hasattr(denoiser, "set_attn_processor"):
        denoiser.set_attn_processor(denoiser.attn_processors)


SETTINGS: dict[str, Callable[[Any], None]] = {
    "slicing": each("set_attention_slice", 1),
    "slicing by a word": lambda d: d.set_attention_slice("max") if hasattr(d, "set_attention_slice") else None,
    "slicing undone": each("set_attention_slice", None),
    "xformers": each("set_use_memory_efficient_attention_xformers", True),
    "xformers undone": each("set_use_memory_efficient_attention_xformers", False),
    "flash attention": each("set_use_npu_flash_attention", False),
    "default processors": each("set_default_attn_processor"),
    "fused projections": each("fuse_qkv_projections"),
    "fused projections of attentions": each("fuse_projections"),
    "fused projections undone": lambda d: (each("fuse_qkv_projections")(d), each("unfuse_qkv_projections")(d)),
    "backend": lambda d: d.set_attention_backend("native"),
    "its own": set_its_own,
}


OPENED = [(name, "load_quantized") for name in FAMILIES] + [
    ("UNet2DModel", "from_pretrained"),
    ("Flux", "from_pretrained"),
]


@pytest.mark.parametrize(("name", "opener"), OPENED)
def test_settings_of_memory_and_speed_change_no_bit(saved: Any, name: str, opener: str, tmp_path: Path) -> None:
    path, family = saved(name)
    denoiser = OPENERS[opener](path, type(family.full))
    expected, processors = family.predict(denoiser), [a.processor for a in attentions(denoiser)]
    for setting, change in SETTINGS.items():
        change(denoiser)
        assert [a.processor for a in attentions(denoiser)] == processors, setting
        assert torch.equal(family.predict(denoiser), expected), setting
    with attention_backend("native"):
        assert torch.equal(family.predict(denoiser), expected)
    denoiser.save_pretrained(tmp_path)
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (path / "unet" / file).read_bytes()


class Mine(diffusers_processors.AttnProcessor2_0):
    """Somebody's own processor."""


def same_name() -> Any:
    """Somebody's own under a name that diffusers has, too."""
    return type("AttnProcessor2_0", (), {})()


OTHERS: dict[str, Callable[[], Any]] = {
    "PAG": diffusers_processors.PAGIdentitySelfAttnProcessor2_0,
    "PAG, guided": diffusers_processors.PAGCFGIdentitySelfAttnProcessor2_0,
    "subclass": Mine,
    "same name": same_name,
    "module": nn.Identity,
    "nothing": lambda: None,
    "another family's": diffusers_processors.HunyuanAttnProcessor2_0,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_processors_are_refused_and_nothing_changes(saved: Any, name: str) -> None:
    path, family = saved(name)
    denoiser = OPENERS["load_quantized"](path, type(family.full))
    processors = [a.processor for a in attentions(denoiser)]
    last = attentions(denoiser)[-1]
    for other, make in OTHERS.items():
        with pytest.raises(UserError, match=r"for which this artifact was calibrated") as caught:
            last.processor = make()
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="attention processor: expected"):
            last.set_processor(make())
        if hasattr(denoiser, "set_attn_processor"):
            wanted = dict(denoiser.attn_processors)
            wanted[next(reversed(wanted))] = make()
            with pytest.raises(UserError, match="attention processor: expected"):
                denoiser.set_attn_processor(wanted)
        assert [a.processor for a in attentions(denoiser)] == processors, other
    assert all(quantized_processor(a) is not None for a in attentions(denoiser))


def test_attentions_whose_calls_are_quantized_keep_their_processors() -> None:
    holder = nn.ModuleDict({"layer": diffusers_processors.Attention(query_dim=8, heads=2, dim_head=4)})
    attention: Any = holder["layer"]
    attention.set_processor(diffusers_processors.HunyuanAttnProcessor2_0())
    holder.forward = lambda sample, timestep: attention(sample)  # noqa: ARG005
    frozen(holder)
    keep_quantized(holder)
    processor = attention.processor
    for change in (
        lambda: attention.set_processor(processor),
        lambda: attention.set_processor(diffusers_processors.HunyuanAttnProcessor2_0()),
        lambda: attention.set_attention_slice(1),
        attention.fuse_projections,
    ):
        change()
        assert attention.processor is processor
    with pytest.raises(UserError, match=r"expected HunyuanAttnProcessor2_0, for which .* got AttnProcessor2_0"):
        attention.processor = diffusers_processors.AttnProcessor2_0()


def test_attentions_that_a_rule_keeps_may_be_set(tmp_path: Path) -> None:
    family, rules = make_family("Stable Diffusion 1"), [LayerRule("down_blocks*", keep=True)]
    save_denoiser(make_denoiser("Stable Diffusion 1"), tmp_path / "a", rules=rules)
    denoiser = OPENERS["load_quantized"](tmp_path / "a", type(family.full))
    expected = family.predict(denoiser)
    denoiser.set_attn_processor(diffusers_processors.AttnProcessor())
    kinds = {name: type(p).__name__ for name, p in denoiser.attn_processors.items()}
    assert {kind for name, kind in kinds.items() if name.startswith("down")} == {"AttnProcessor"}
    assert {kind for name, kind in kinds.items() if not name.startswith("down")} == {"QuantAttnProcessor"}
    assert torch.allclose(family.predict(denoiser), expected, atol=1e-5)


def test_a_copy_keeps_them_too(saved: Any) -> None:
    path, family = saved("Stable Diffusion 1")
    denoiser = OPENERS["load_quantized"](path, type(family.full))
    expected = family.predict(denoiser)
    copied = copy.deepcopy(denoiser)
    copied.set_attn_processor(diffusers_processors.AttnProcessor())
    copied.set_attention_slice(1)
    assert torch.equal(family.predict(copied), expected)
    with pytest.raises(UserError, match="got HunyuanAttnProcessor2_0"):
        attentions(copied)[0].processor = diffusers_processors.HunyuanAttnProcessor2_0()


def test_what_is_quantized_otherwise_is_not_saved(saved: Any, tmp_path: Path) -> None:
    path, family = saved("DiT")
    denoiser = OPENERS["load_quantized"](path, type(family.full))
    attention = attentions(denoiser)[0]
    del attention._modules["processor"]
    nn.Module.__setattr__(attention, "processor", diffusers_processors.AttnProcessor2_0())
    with pytest.raises(UserError, match=r"transformer_blocks.0.attn1 is quantized otherwise than in the artifact"):
        denoiser.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()
