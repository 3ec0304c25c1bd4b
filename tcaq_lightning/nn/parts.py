"""The quantized parts within a module: layers and quantizers."""

from __future__ import annotations

from typing import Any

from torch import nn

from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.quantizers import ActivationQuantizer, OutputQuantizer, Quantizer, SoftmaxQuantizer
from tcaq_lightning.quantizers.base import Place


def quant_layers(module: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers within a module, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, QuantLayer)}


def quantizers(module: nn.Module) -> dict[str, ActivationQuantizer | SoftmaxQuantizer]:
    """Activation and softmax quantizers within a module, each once, by name."""
    found: dict[str, Any] = dict(module.named_modules())
    return {n: m for n, m in found.items() if _at(m, "input", "probabilities")}


def output_quantizers(module: nn.Module) -> list[OutputQuantizer]:
    """Quantizers of the outputs of layers within a module."""
    found: list[Any] = list(module.modules())
    return [m for m in found if _at(m, "output")]


def _at(module: Any, *places: Place) -> bool:
    return isinstance(module, Quantizer) and module.place in places


def readers(module: nn.Module) -> dict[int, list[QuantLayer]]:
    """Layers within a module by the id of the input quantizer that they read."""
    found: dict[int, list[QuantLayer]] = {}
    for layer in quant_layers(module).values():
        found.setdefault(id(layer.input_quantizer), []).append(layer)
    return found


def set_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name`, in the same training mode.

    Args:
        root: module that it is part of.
        name: dotted name within the root.
        module: the new module.
    """
    parent, _, child = name.rpartition(".")
    owner = root.get_submodule(parent)
    module.train(owner.training)
    setattr(owner, child, module)
