"""The contract of writers: which layers a file format holds, and how it is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tcaq_lightning.config.checks import FLOAT_BITS
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.attention import QuantAttnProcessor, quantized_processor
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.quantizers import CodedWeight
from tcaq_lightning.runtime.registry import Registry


@dataclass
class Checkpoint:
    """What of a frozen denoiser stands in a file, by default under the names that diffusers gives to it.

    Attributes:
        held: weights of the layers whose codes the format holds.
        kept: layers whose weights are written in float, with the reason.
        plain: all other tensors, biases and the weights of kept layers among them.
    """

    held: dict[str, CodedWeight] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)


def coded(layer: QuantLayer) -> CodedWeight:
    """The weight of a layer of a frozen denoiser."""
    return cast("CodedWeight", layer.weight_quantizer)


class Writer(ABC):
    """Writes the denoiser of an artifact as a file of another tool; entered into `WRITERS` under its `--format`.

    Attributes:
        suffix: of the file.
        consumers: what reads it, for messages.
        wanted: settings that fit the format, for messages.
    """

    suffix: ClassVar[str]
    consumers: ClassVar[str]
    wanted: ClassVar[str]

    @abstractmethod
    def check(self) -> None:
        """Check that what it needs is installed.

        Raises:
            UserError: it is not; the message names the extra.
        """

    @abstractmethod
    def cannot_hold(self, layer: QuantLayer) -> str:
        """Why a layer's codes cannot stand in the file; empty if they can.

        The weight of such a layer is written in float: it is then what our simulation computes with, in more bytes.
        Only what is asked of layers beyond this format's weights (their inputs, r, the bias) is checked elsewhere.
        """

    @abstractmethod
    def write(self, denoiser: Any, checkpoint: Checkpoint, file: Path) -> None:
        """Write the file.

        Args:
            denoiser: frozen, for its class and config.
            checkpoint: what stands in the file.
            file: does not exist.
        """


WRITERS: Registry[type[Writer]] = Registry("export format")
"""By the name that `export --format` takes."""


def split(denoiser: nn.Module, writer: Writer) -> Checkpoint:
    """Divide a frozen denoiser's tensors into those that a format holds as codes, and plain ones.

    Biases take the correction of mean errors up. What is left of a quantized layer is a weight and a bias as the
    full-precision layer has them.

    Raises:
        UserError: inputs, attention operands or outputs are quantized, or the correction differs between timesteps.
    """
    found = Checkpoint()
    ours: list[str] = []
    for name, module in denoiser.named_modules():
        if quantized_processor(module) is not None:
            _refuse(name, "has quantized operands", "quantization.activation.bits: 16")
        if isinstance(module, (QuantLayer, QuantAttnProcessor)):
            ours.append(f"{name}.")
    for name, tensor in denoiser.state_dict().items():
        if not name.startswith(tuple(ours)):
            found.plain[name] = tensor
    for name, layer in quant_layers(denoiser).items():
        _check(name, layer)
        if layer.input_quantizer.reparameterized:
            found.kept[name] = "r of its input is not 1; tcr.enabled: false leaves it out"
        elif reason := writer.cannot_hold(layer):
            found.kept[name] = reason
        else:
            found.held[name] = coded(layer)
        if name in found.kept:
            found.plain[f"{name}.weight"] = layer.weight_quantizer(layer.input_quantizer.r)
        if (bias := _bias(layer)) is not None:
            found.plain[f"{name}.bias"] = bias
    return found


def _check(name: str, layer: QuantLayer) -> None:
    if layer.spec.activation_bits != FLOAT_BITS:
        _refuse(name, f"has inputs of {layer.spec.activation_bits} bits", "quantization.activation.bits: 16")
    if layer.bias_shift is not None and len(layer.bias_shift) > 1:
        _refuse(name, "has a bias for each timestep group", "quantization.activation.timestep_groups: 1")
    if layer.bias_shift is not None and layer.bias is None and bool(layer.bias_shift.any()):
        _refuse(name, "has a correction of its mean error, but no bias", "reconstruction.bias_correction: false")


def _refuse(name: str, what: str, fix: str) -> None:
    raise UserError(f"{name} {what}, which a file of weights cannot hold; calibrate with {fix}")


def _bias(layer: QuantLayer) -> Tensor | None:
    if layer.bias is None or layer.bias_shift is None:
        return None if layer.bias is None else layer.bias.detach()
    return layer.bias.detach() + layer.bias_shift[0]
