"""Which modules of a denoiser are units: what is reconstructed one after another."""

from __future__ import annotations

from torch import nn

from tcaq_lightning.models.families import LAYERS_WITH_WEIGHTS, family_of


def find_units(denoiser: nn.Module, layers: tuple[type[nn.Module], ...] = LAYERS_WITH_WEIGHTS) -> list[str]:
    """Names of the units: blocks, and attentions and layers with weights outside of any, in definition order."""
    units: list[str] = []
    family = family_of(denoiser)

    def visit(module: nn.Module, name: str) -> None:
        if isinstance(module, layers) or family.is_block(denoiser, module):
            units.append(name)
            return
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)

    visit(denoiser, "")
    return units
