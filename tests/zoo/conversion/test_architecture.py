"""The shipped model configs: they build, have the published sizes, and are what the original YAML files become."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tcaq_lightning.zoo.conversion import ddim, latent_config
from tcaq_lightning.zoo.conversion.architecture import ARCHITECTURES, INDEX, Architecture, names, read_architecture
from tests.zoo.conversion.published import BEDROOMS, CHURCHES, DDIM_CIFAR10, DDIM_LSUN, IMAGENET, STABLE_DIFFUSION

PARAMETERS = {
    "ddpm-cifar10-32": 35_746_307,  # 35.7 M (Ho et al. 2020, appendix B)
    "ddim-cifar10": 35_746_307,
    "ddim-lsun": 113_673_219,  # 114 M (likewise)
    "lsun-bedrooms-ldm4": 274_056_163,  # 274 M (Rombach et al. 2022, table 12)
    "lsun-churches-ldm8": 294_966_916,  # 295 M (likewise)
    "imagenet-ldm4": 400_920_579,  # 400 M (likewise, table 13)
    "stable-diffusion-v1-4": 859_520_964,  # 860 M (model card)
    "sdxl-base-1.0": 2_567_463_684,  # 2.6 B (Podell et al. 2023, table 1)
    "pixart-alpha-xl-2-256": 610_856_096,  # 0.6 B (Chen et al. 2023)
    "pixart-alpha-xl-2-512": 610_856_096,
    "sd3-medium": 2_028_328_000,  # 2 B (model card)
    "flux.1-dev": 11_901_408_320,  # 12 B (model card)
}
OTHERS = {"vq-f4": 55_322_782, "kl-f8": 83_653_863, "kl, 16 channels": 83_819_683}
DIT_XL_2 = 675_129_632
"""675 M (Peebles and Xie 2023, table 1), the original class' parameters with its fixed positions of 256 x 1152."""


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def denoiser(architecture: Architecture) -> Any:
    return architecture["unet" if "unet" in architecture.components else "transformer"].build()


def test_all_are_listed() -> None:
    assert names() == sorted([*PARAMETERS, "dit-xl-2-256"])


@pytest.mark.parametrize("name", PARAMETERS)
def test_denoisers_have_the_published_sizes(name: str) -> None:
    module = denoiser(read_architecture(ARCHITECTURES / name))
    assert all(p.is_meta for p in module.parameters())
    assert count(module) == PARAMETERS[name]


def test_dit_has_the_published_size() -> None:
    """Diffusers repeats the embedders of timestep and class in each of the 28 blocks."""
    module = denoiser(read_architecture(ARCHITECTURES / "dit-xl-2-256"))
    embedders = count(module.transformer_blocks[0].norm1.emb)
    assert count(module) - 27 * embedders + 256 * 1152 == DIT_XL_2


@pytest.mark.parametrize("name", [*PARAMETERS, "dit-xl-2-256"])
def test_the_other_components_build(name: str) -> None:
    architecture = read_architecture(ARCHITECTURES / name)
    scheduler = architecture["scheduler"].build_scheduler()
    scheduler.set_timesteps(20, **({"mu": 1.15} if scheduler.config.get("use_dynamic_shifting") else {}))
    assert len(scheduler.timesteps) >= 20
    assert architecture.first_stage is None or count(architecture[architecture.first_stage].build()) in OTHERS.values()
    if name == "imagenet-ldm4":
        assert architecture["class_embedder"].build().embedding.weight.shape == (1001, 512)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddim-cifar10", ddim.architecture(DDIM_CIFAR10)),
        ("ddim-lsun", ddim.architecture(DDIM_LSUN)),
        ("lsun-bedrooms-ldm4", latent_config.architecture(BEDROOMS)),
        ("lsun-churches-ldm8", latent_config.architecture(CHURCHES)),
        ("imagenet-ldm4", latent_config.architecture(IMAGENET)),
        ("stable-diffusion-v1-4", latent_config.architecture(STABLE_DIFFUSION)),
    ],
)
def test_they_are_what_the_original_yaml_files_become(name: str, expected: Architecture) -> None:
    assert read_architecture(ARCHITECTURES / name) == expected


@pytest.mark.parametrize("name", [*PARAMETERS, "dit-xl-2-256"])
def test_components_settings_are_all_known_to_their_classes(name: str) -> None:
    """Diffusers ignores a misspelt setting."""
    for component in read_architecture(ARCHITECTURES / name).components.values():
        if component is not None and component.library != "transformers":
            known = component.load_class()._get_init_keys(component.load_class())
            assert set(component.config) <= known


@pytest.mark.parametrize("name", [*PARAMETERS, "dit-xl-2-256"])
def test_every_config_has_its_component(name: str) -> None:
    index = json.loads((ARCHITECTURES / name / INDEX).read_text())
    present = {f.parent.name for f in (ARCHITECTURES / name).glob("*/*.json")}
    assert present == {k for k, v in index.items() if isinstance(v, list) and v[1]}
