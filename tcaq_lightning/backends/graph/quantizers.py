"""Quantizers of the exported graph: codes of constant scale and zero point, the timestep group's around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq_lightning.backends.graph.operators import Constants, coded
from tcaq_lightning.backends.graph.tables import Timesteps
from tcaq_lightning.errors import UserError
from tcaq_lightning.quantizers import ActivationQuantizer, SoftmaxQuantizer
from tcaq_lightning.quantizers.activation import along
from tcaq_lightning.quantizers.uniform import affine_range
from tcaq_lightning.runtime.registry import Registry


class GraphQuantizer(nn.Module):
    """An `ActivationQuantizer` as QuantizeLinear and DequantizeLinear of constant scale and zero point.

    Attributes:
        signed: codes are int8, 2^(b-1) below the unsigned ones, for the second operand of a matmul of two activations.
        code_bits: of the largest code that an engine sees.
        centre: zero point Z of the operators, the same for all groups, or None where zero points stand beside them.
        repeats: rows of each sample in the last input.
    """

    shift: Tensor | None
    r: Tensor | None

    def __init__(
        self,
        source: ActivationQuantizer,
        times: Timesteps,
        constants: Constants,
        signed: bool = False,
        centred: bool = False,
    ) -> None:
        super().__init__()
        assert not (signed and centred)
        self.bits, self.channel_dim, self.times, self.signed = source.bits, source.channel_dim, times, signed
        self.levels, self.repeats = 2**source.bits - 1, 1
        steps, zeros = source.steps().detach(), source.zero_point
        self.step_column = times.column(steps)
        self.zero_column = times.column(zeros)
        r = source.scales().detach()
        self.register_buffer("r", None if bool((r == 1).all()) else r)
        self.register_buffer("shift", source.shift)
        self.middle = 2 ** (source.bits - 1) if signed else 0
        self.upper = self.levels - self.middle
        self.code_scale = constants.scalar(1.0, torch.float32)
        self.centre = int(zeros.max()) if centred else None
        self.code_zero = constants.scalar(self.centre or 0, torch.int8 if signed else torch.uint8)
        self.one_zero = bool((zeros == zeros[0]).all())
        reach = self.levels if self.centre is None else self.centre - int(zeros.min()) + self.levels
        self.code_bits = reach.bit_length()
        if reach > 255:
            raise UserError(
                f"the {self.bits}-bit input of a layer with a quantized output has codes up to {reach} around one zero "
                "point; expected at most 255: calibrate it with one zero point for all timestep groups"
            )

    def step(self, dims: int) -> Tensor:
        """Step s_g of the running batch, (B, 1, ..., 1)."""
        return self.times.value(self.step_column, dims, self.repeats)

    def zero(self, dims: int) -> Tensor:
        """z of the codes that come out, for the running batch."""
        zero = self.times.value(self.zero_column, dims, self.repeats)
        return zero - self.middle if self.middle else zero

    def forward(self, x: Tensor) -> Tensor:
        """Codes as floats, of x's shape: u, or u - 2^(b-1), or u - z_g around one zero point."""
        return self.codes(self.centred(x))

    def centred(self, x: Tensor) -> Tensor:
        """x - shift."""
        return x if self.shift is None else x - along(self.shift, x.ndim, self.channel_dim)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of centred values."""
        self.repeats = self.times.repeats(int(x.shape[0]))
        step = self.step(x.ndim)
        if self.r is not None:
            step = step * along(self.r, x.ndim, self.channel_dim)
        x = x / step
        if self.centre is not None:
            return coded(self._within(x, self.centre), self.code_scale, self.code_zero)
        x = x + self.zero(x.ndim)
        if self.levels < 255:
            x = x.clamp(max=self.upper)
            if self.signed:
                x = x.clamp(min=-self.middle)
        return coded(x, self.code_scale, self.code_zero)

    def _within(self, x: Tensor, centre: int) -> Tensor:
        """Keep x / step within the codes of its group, u - z_g."""
        if self.levels == 255:
            return x
        if self.one_zero:
            return x.clamp(-centre, self.levels - centre)
        zero = self.zero(x.ndim)
        return torch.minimum(torch.maximum(x, -zero), self.levels - zero)


class GraphTokenQuantizer(GraphQuantizer):
    """A `TokenQuantizer`: step and zero point are computed in the graph from each token, in standard operators.

    `step` and `zero` are those of the last call, (..., 1), which the layers that read its codes multiply with.
    """

    def __init__(self, source: ActivationQuantizer, times: Timesteps, constants: Constants) -> None:
        super().__init__(source, times, constants)
        self._found: tuple[Tensor, Tensor] | None = None

    def step(self, dims: int) -> Tensor:
        """Of each token of the last call."""
        assert self._found is not None
        return self._found[0]

    def zero(self, dims: int) -> Tensor:
        """Likewise."""
        assert self._found is not None
        return self._found[1]

    def forward(self, x: Tensor) -> Tensor:
        """Codes as floats, of x's shape."""
        x = self.centred(x)
        scaled = x if self.r is None else x / along(self.r, x.ndim, self.channel_dim)
        low, high = scaled.amin(self.channel_dim, keepdim=True), scaled.amax(self.channel_dim, keepdim=True)
        self._found = affine_range(low, high, self.bits)
        return self.codes(x)


GRAPH_QUANTIZERS: Registry[type[GraphQuantizer]] = Registry("activation quantizer of the exported graph")
"""By `kind` of an activation quantizer, what it becomes in the graph."""
GRAPH_QUANTIZERS.register("uniform")(GraphQuantizer)
GRAPH_QUANTIZERS.register("token")(GraphTokenQuantizer)


def graph_quantizer(
    name: str, source: ActivationQuantizer, times: Timesteps, constants: Constants, centred: bool = False
) -> GraphQuantizer:
    """What the quantizer of a layer's input becomes in the graph.

    Args:
        name: of the layer, for the message.
        source: the quantizer.
        times: tables of the graph.
        constants: of the graph.
        centred: around one zero point for all groups.

    Raises:
        UserError: no graph form is registered for its kind.
    """
    form = graph_form(name, source)
    return form(source, times, constants, centred=True) if centred else form(source, times, constants)


def graph_form(name: str, source: ActivationQuantizer) -> type[GraphQuantizer]:
    """The graph form of an activation quantizer.

    Raises:
        UserError: none is registered for its kind.
    """
    if source.kind not in GRAPH_QUANTIZERS:
        raise UserError(
            f"unsupported quantizer {source.kind} of {name}: expected one of "
            f"{', '.join(GRAPH_QUANTIZERS)}, or a graph form of it in GRAPH_QUANTIZERS; or keep the layer with a rule: "
            f"quantization.rules: [{{pattern: {name}, keep: true}}]"
        )
    return GRAPH_QUANTIZERS[source.kind]


class GraphSoftmaxQuantizer(nn.Module):
    """A `SoftmaxQuantizer`: codes where all groups are uniform, else its values by exact operations.

    Attributes:
        integer: codes come out, times nothing; else the quantized values.
    """

    def __init__(self, source: SoftmaxQuantizer, times: Timesteps, constants: Constants) -> None:
        super().__init__()
        self.bits, self.times = source.bits, times
        logarithmic = source.logarithmic()
        self.integer, self.mixed = not any(logarithmic), any(logarithmic) and not all(logarithmic)
        steps = source.steps().detach()
        self.delta_column = times.column(steps)
        self.tau_column = times.column(source.tau)
        self.one = constants.scalar(1.0, torch.float32)
        self.nought = constants.scalar(0, torch.uint8)

    def step(self) -> Tensor:
        """Uniform step of the running batch."""
        return self.times.value(self.delta_column, 4)

    def forward(self, p: Tensor) -> Tensor:
        """(B, heads, T, S) probabilities to codes or values."""
        if self.integer:
            return self._codes(p)
        delta, tau = self.times.value(self.delta_column, 4), self.times.value(self.tau_column, 4)
        if not self.mixed:
            return self._logarithmic(p, delta, tau)
        uniform = torch.round(p / delta).clamp(0, 2**self.bits - 1) * delta
        return torch.where(tau > 0, self._logarithmic(p, delta, torch.where(tau > 0, tau, 1.0)), uniform)

    def _logarithmic(self, p: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
        """`log_fake_quantize` in operators that ONNX has: it knows no exp2."""
        last = 2**self.bits - 1
        codes = torch.round(-torch.log2(p / delta) / tau).clamp(0, last)
        values: Tensor = torch.pow(2.0, -tau * codes) * delta * (last - codes).clamp(max=1)
        return values

    def _codes(self, p: Tensor) -> Tensor:
        x = p / self.step()
        if self.bits < 8:
            x = x.clamp(max=2**self.bits - 1)
        return coded(x, self.one, self.nought)
