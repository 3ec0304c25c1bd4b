"""Bits and granularity."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from tcaq_lightning.config.checks import (
    FLOAT_BITS,
    Section,
    require,
    require_activation_bits,
    require_bits,
    require_count,
    require_text,
)

Granularity = int | Literal["channel", "tensor"]
"""Which weights share a scale: those of an output channel, all, or so many neighbouring inputs of a channel."""


@dataclass
class WeightConfig(Section):
    """Weight quantizers."""

    bits: int = 4
    """Code width, 2..8."""
    symmetric: bool = True
    """Constant zero point, as integer kernels want it; false searches a zero point per channel, for comparison."""
    format: str = "int"
    """Number format of the codes: int; e4m3, e5m2, e3m4, e2m5, e3m2, e2m3, e2m1; mxfp8, mxfp6, mxfp4, nvfp4; nf4; q8_0,
    q5_0, q5_1, q4_0, q4_1 of GGUF; or one that a module in `extensions` registers."""
    granularity: Granularity | None = None
    """Which weights share a scale: channel (of the output), tensor, or a number of neighbouring inputs of an output
    channel; null: the format's own, which is channel for int and floats. Formats with blocks take null only."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        require_bits(self.bits, "quantization.weight.bits")
        require_granularity(self.granularity, "quantization.weight.granularity")


def require_granularity(value: Granularity | None, key: str) -> None:
    """Check that it is no absurd number of inputs."""
    require(not isinstance(value, int) or 2 <= value <= 2**20, key, "at least 2 and at most 2^20", value)


@dataclass
class ActivationConfig(Section):
    """Activation quantizers: one step and zero point per tensor and timestep group."""

    bits: int = 8
    """Code width, 2..8; 16: inputs, q, k, v and probabilities stay in floating point, weights alone are quantized."""
    timestep_groups: int = 20
    """Number of timestep intervals G with their own parameters; 1 is static."""
    dynamic_per_token: bool = False
    """Give the inputs of linear layers a step and zero point for every token, from its values at run time, instead of
    those of its timestep group; for transformers. Convolutions, and q, k, v, keep theirs."""
    quantizer: str = "uniform"
    """Quantizer of the inputs of layers and of q, k, v: uniform, or one that a module in `extensions` registers."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        require_activation_bits(self.bits, "quantization.activation.bits")
        require_count(self.timestep_groups, "quantization.activation.timestep_groups", most=10_000)


@dataclass
class SoftmaxConfig(Section):
    """Quantizers of post-softmax values; daq decides their kind."""

    bits: int | None = None
    """Code width, 2..8; null takes quantization.activation.bits."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        require_bits(self.bits, "quantization.softmax.bits")


Role = Literal["input", "output", "time", "modulation", "shortcut", "block"]
"""What a layer is for in its denoiser: it reads the noisy sample or the context, gives the prediction, embeds the
timestep, turns the condition into scales, shifts and gates, carries a stream past a block, or none of these."""


@dataclass
class LayerRule(Section):
    """What holds for the layers of a role, or for those whose name matches; a later rule overrides an earlier one."""

    pattern: str | None = None
    """Shell-style pattern on the module's name within the denoiser, such as *.time_emb_proj. It must match something;
    give either a pattern or a role."""
    weight_bits: int | None = None
    """Code width of the weights, null leaves it."""
    activation_bits: int | None = None
    """Code width of the inputs (for an attention: of q, k and v), 16 for floating point, null leaves it."""
    softmax_bits: int | None = None
    """Code width of an attention's probabilities, null leaves it."""
    keep: bool = False
    """Leave the layer in full precision."""
    float_output: bool | None = None
    """With quantization.integer_ready: true leaves a convolution's output in floating point, false quantizes it; null:
    only that of the layer with role output, the prediction itself, is left."""
    role: Role | None = None
    """Role of the layers, in any model: input, output, time, modulation, shortcut, or block for all others and for
    attentions. A model may have no layer of a role."""
    weight_format: str | None = None
    """Number format of the weights, null leaves it. Another one has a granularity of its own."""
    weight_granularity: Granularity | None = None
    """Which weights share a scale: channel, tensor or a number of inputs, null leaves it."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        require(
            (self.pattern is None) != (self.role is None),
            "quantization.rules",
            "rules with either a role or a pattern",
            {"role": self.role, "pattern": self.pattern},
        )
        require_text(self.pattern, "quantization.rules.pattern")
        key = f"quantization.rules[{self.role or self.pattern}]"
        for name in ("weight_bits", "softmax_bits"):
            require_bits(getattr(self, name), f"{key}.{name}")
        require_activation_bits(self.activation_bits, f"{key}.activation_bits")
        require_granularity(self.weight_granularity, f"{key}.weight_granularity")

    def matches(self, name: str, role: Role) -> bool:
        """Whether the rule is about the layer or attention called `name` in that role."""
        return role == self.role if self.pattern is None else fnmatchcase(name, self.pattern)


@dataclass
class QuantizationConfig(Section):
    """Bits and granularity."""

    weight: WeightConfig = field(default_factory=WeightConfig)
    """Weights."""
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    """Inputs of layers, and q, k, v."""
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)
    """Attention probabilities."""
    rules: list[LayerRule] = field(default_factory=list)
    """Layers that differ or are kept: a role (input, output, time, modulation, shortcut, block) or a shell-style
    pattern on the module's name, and weight_bits, activation_bits, softmax_bits, weight_format, weight_granularity
    (each null or left out: unchanged), keep: true, or float_output: true or false (with integer_ready). A later rule
    overrides an earlier one."""
    range_norm: float = 2.4
    """p in the error sum |x - x^|^p that the range searches of weights, inputs and outputs minimise; 2.4 as in
    AdaRound's and BRECQ's code, 2 is the squared error."""
    integer_ready: bool = False
    """Quantize the outputs of convolutions too, to 8 bits by channel, for engines without integer convolutions that
    give floats (ONNX Runtime). These quantizers are calibrated, learned and simulated like all others."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        for section in (self.weight, self.activation, self.softmax, *self.rules):
            section.check()
        require(1 <= self.range_norm <= 16, "quantization.range_norm", "in [1, 16]", self.range_norm)
        if self.activation.bits == FLOAT_BITS:
            expected = "null, since quantization.activation.bits is 16"
            require(self.softmax.bits is None, "quantization.softmax.bits", expected, self.softmax.bits)
