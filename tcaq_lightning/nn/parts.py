"""The quantized parts within a module: layers, quantizers, units."""

from __future__ import annotations

from torch import nn

from tcaq_lightning.models.units import find_units
from tcaq_lightning.nn.layers import LAYERS, QuantLayer
from tcaq_lightning.quantizers import ActivationQuantizer, OutputQuantizer, SoftmaxQuantizer


def find_quantized_units(denoiser: nn.Module) -> list[str]:
    """Units of a denoiser whose layers have been replaced."""
    return find_units(denoiser, layers=(*LAYERS, QuantLayer))


def quant_layers(module: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers within a module, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, QuantLayer)}


def quantizers(module: nn.Module) -> dict[str, ActivationQuantizer | SoftmaxQuantizer]:
    """Activation and softmax quantizers within a module, each once, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, (ActivationQuantizer, SoftmaxQuantizer))}


def output_quantizers(module: nn.Module) -> list[OutputQuantizer]:
    """Quantizers of the outputs of layers within a module."""
    return [m for m in module.modules() if isinstance(m, OutputQuantizer)]


def readers(module: nn.Module) -> dict[int, list[QuantLayer]]:
    """Layers within a module by the id of the input quantizer that they read."""
    found: dict[int, list[QuantLayer]] = {}
    for layer in quant_layers(module).values():
        found.setdefault(id(layer.input_quantizer), []).append(layer)
    return found


def set_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name`, in the same training mode."""
    parent, _, child = name.rpartition(".")
    owner = root.get_submodule(parent)
    module.train(owner.training)
    setattr(owner, child, module)
