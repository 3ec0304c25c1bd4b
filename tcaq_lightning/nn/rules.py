"""Which bits a layer has: the general ones, changed by the rules that match its name."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from tcaq_lightning.config import QuantizationConfig, Role
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.families import is_attention
from tcaq_lightning.quantizers.output import OUTPUT_BITS

PREDICTION: Role = "output"
"""Role of the convolution whose output is a UNet's prediction: 8 bits of it cost more error than those of all others,
and its integer kernel saves next to nothing."""


@dataclass(frozen=True)
class LayerBits:
    """Bits of one layer or attention under the rules; None where that operand stays in full precision.

    Attributes:
        weight: of a layer's weight.
        activation: of a layer's input, or of an attention's q, k and v.
        softmax: of an attention's probabilities.
        output: of the output of a layer whose kind has quantized outputs.
        weight_format: number format of a layer's weight.
        weight_granularity: which values of it share a scale; None as the format has it.
    """

    weight: int | None
    activation: int | None
    softmax: int | None
    output: int | None = None
    weight_format: str = "int"
    weight_granularity: int | str | None = None

    @property
    def kept(self) -> bool:
        """Whether the layer stays in full precision."""
        return self.weight is None


def bits_of(name: str, config: QuantizationConfig, role: Role = "block") -> LayerBits:
    """Bits of the layer or attention called `name`: the general ones, changed by every rule that matches, in order.

    Args:
        name: of the layer or attention.
        config: general bits and rules.
        role: of the layer in its denoiser.

    >>> from tcaq_lightning.config import LayerRule
    >>> rules = [LayerRule("conv_*", weight_bits=8), LayerRule(role="input", activation_bits=6)]
    >>> bits_of("conv_in", QuantizationConfig(rules=rules), "input")
    LayerBits(weight=8, activation=6, softmax=8, output=None, weight_format='int', weight_granularity=None)
    """
    weight: int | None = config.weight.bits
    activation: int | None = config.activation.bits
    softmax = config.softmax.bits or config.activation.bits
    weight_format, granularity = config.weight.format, config.weight.granularity
    float_output = role == PREDICTION
    kept = False
    for rule in config.rules:
        if rule.matches(name, role):
            about_bits = any(
                (
                    rule.weight_bits,
                    rule.activation_bits,
                    rule.softmax_bits,
                    rule.weight_format,
                    rule.weight_granularity,
                )
            )
            kept = rule.keep or (kept and rule.float_output is not None and not about_bits)
            weight = rule.weight_bits or weight
            activation = rule.activation_bits or activation
            softmax = rule.softmax_bits or softmax
            if rule.weight_format or rule.weight_granularity:  # another format has a granularity of its own
                granularity = rule.weight_granularity
            weight_format = rule.weight_format or weight_format
            float_output = float_output if rule.float_output is None else rule.float_output
    output = OUTPUT_BITS if config.integer_ready and not float_output else None
    if kept:
        return LayerBits(None, None, None)
    return LayerBits(weight, activation, softmax, output, weight_format, granularity)


def check_rules(denoiser: nn.Module, config: QuantizationConfig) -> None:
    """Check that every rule has a layer or an attention to apply to.

    Args:
        denoiser: full precision.
        config: bits and rules.

    Raises:
        UserError: a pattern matches nothing, or a rule is about quantized outputs where none are quantized.
    """
    names = [
        name
        for name, module in denoiser.named_modules()
        if is_attention(module) or any(True for _ in module.parameters(recurse=False))
    ]
    for rule in config.rules:
        if rule.pattern is not None and not any(fnmatchcase(name, rule.pattern) for name in names):
            raise UserError(
                f"quantization.rules: pattern {rule.pattern!r} matches no layer or attention of "
                f"{type(denoiser).__name__}; expected shell-style patterns on names such as {names[-1]}"
            )
        if rule.float_output is not None and not config.integer_ready:
            raise UserError(
                f"quantization.rules: {rule.role or rule.pattern!r} sets float_output, which is about quantized "
                "outputs; expected quantization.integer_ready: true beside it"
            )
