"""What calibration sets and learns in a module: switched off, settled, taken out and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import output_quantizers, quant_layers, quantizers
from tcaq_lightning.quantizers import Rounding


@contextmanager
def full_precision(unit: nn.Module) -> Iterator[None]:
    """Switch all quantizers of a unit off for a while: its layers then compute with the original weights."""
    layers = list(quant_layers(unit).values())
    activations = [*quantizers(unit).values(), *output_quantizers(unit)]
    for quantizer in activations:
        quantizer.enabled = False
    for layer in layers:
        layer.learned_weight.rounding = Rounding.FLOAT
    try:
        yield
    finally:
        for quantizer in [*quantizers(unit).values(), *output_quantizers(unit)]:  # some may be new
            quantizer.enabled = True
        for layer in layers:
            layer.learned_weight.rounding = Rounding.HARD


@torch.no_grad()
def settle(module: nn.Module) -> None:
    """Settle the rounding of all layers within a module: of their logits nothing is left but codes."""
    for layer in quant_layers(module).values():
        layer.learned_weight.settle(layer.input_quantizer.r)


def quantization_state(module: nn.Module) -> dict[str, Tensor]:
    """What calibration sets and learns in a module: everything but the full-precision parameters.

    Rounding logits are part of it where layers are open.
    """
    return {k: v.detach().clone() for k, v in _calibrated(module).items()}


def _calibrated(module: nn.Module) -> dict[str, Tensor]:
    layers = quant_layers(module)
    full_precision = {f"{n}.weight_quantizer.weight" if n else "weight_quantizer.weight" for n in layers}
    full_precision |= {n for n, _ in module.named_parameters() if n not in full_precision}
    return {k: v for k, v in module.state_dict().items() if k not in full_precision}


def _logits_names(module: nn.Module) -> dict[str, QuantLayer]:
    """Layers by the name of their rounding logits."""
    return {f"{n}.weight_quantizer.v".removeprefix("."): layer for n, layer in quant_layers(module).items()}


def check_quantization_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Check that a state from `quantization_state` is of this module.

    Raises:
        KeyError: it is the state of another module.
    """
    logits = _logits_names(module)
    expected = {k: v.shape for k, v in _calibrated(module).items() if k not in logits}
    expected |= {k: layer.learned_weight.weight.shape for k, layer in logits.items() if k in state}
    if {k: v.shape for k, v in state.items()} != expected:
        raise KeyError("the stored state does not fit the unit")


def restore_quantization_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a state from `quantization_state` back; layers whose logits it holds are open afterwards, others are not.

    Raises:
        KeyError: it is the state of another module.
    """
    check_quantization_state(module, state)
    for name, layer in _logits_names(module).items():
        if name in state:
            layer.learned_weight.open()
        else:
            layer.learned_weight.discard_logits()
    module.load_state_dict(state, strict=False)
