"""Quantizers of activations: per tensor, one step and zero point for each timestep group, r for each channel."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tcaq_lightning.quantizers.logarithmic import log_fake_quantize
from tcaq_lightning.quantizers.steps import LearnedSteps
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.quantizers.uniform import affine_range, fake_quantize
from tcaq_lightning.runtime.precision import autocast_type


def per_sample(table: Tensor, groups: Tensor, dims: int) -> Tensor:
    """Rows of a (G,) table for a batch: (B, 1, ..., 1) with `dims` axes."""
    return table.index_select(0, groups).view(-1, *[1] * (dims - 1))


def for_all_samples(x: Tensor, rows: int) -> Tensor:
    """A single row stands for all samples, such as one timestep's embedding: (1, ...) as (rows, ...)."""
    return x.expand(rows, *x.shape[1:]) if x.shape[0] == 1 < rows else x


def along(values: Tensor, dims: int, channel_dim: int) -> Tensor:
    """(C,) values beside a tensor of `dims` axes with its channels on `channel_dim`."""
    shape = [1] * dims
    shape[channel_dim] = -1
    return values.view(shape)


def widened(x: Tensor) -> Tensor:
    """In float32 where the type is narrower, unless autocast is to choose: what is searched or summed needs it."""
    return x if autocast_type(x) is not None else x.to(torch.promote_types(x.dtype, torch.float32))


class ActivationQuantizer(nn.Module):
    """Uniform affine quantizer of one tensor, reparameterized by channel (METHOD sections 1 and 3).

    x^ = r_d s_g (clip(round(x / (r_d s_g)) + z_g, 0, 2^b - 1) - z_g): the division by r and the multiplication back
    (which real kernels find in the weights) are one step of r_d s_g, so TCR costs nothing here. Where the layer is
    pointwise, x is x - shift, and the layer adds what the shift contributes (channel shifting of Outlier Suppression+,
    Wei et al. 2023): with padding, zeros would have to be shifted too.

    Attributes:
        delta: (G,) steps s. zero_point: (G,) integer-valued. r: (C,), all ones where TCR is off.
        shift: (C,) centres of the channels' ranges, or None where they stay.
        log_delta, log_r: relative changes that are being learned; None outside of a fit.
        enabled: off while statistics are taken.
        headroom: factor on searched ranges. Other than 1 nothing is learned, since learning would take it away.
        constant_zero: whether all groups must have one zero point.
        drop_probability: QDrop's share of elements that stay in full precision during a fit (Wei et al. 2022).
    """

    delta: Tensor
    zero_point: Tensor
    r: Tensor
    shift: Tensor | None

    def __init__(self, bits: int, groups: TimestepGroups, channels: int = 1, channel_dim: int = -1) -> None:
        super().__init__()
        self.bits = bits
        self.groups = groups
        self.channel_dim = channel_dim
        self.enabled = True
        self.headroom = 1.0
        self.constant_zero = False
        self.drop_probability = 0.0
        self.register_buffer("delta", torch.ones(groups.num_groups))
        self.register_buffer("zero_point", torch.zeros(groups.num_groups))
        self.register_buffer("r", torch.ones(channels))
        self.register_buffer("shift", None)
        self.log_delta: nn.Parameter | None = None
        self.log_r: nn.Parameter | None = None

    def allow_shift(self) -> None:
        """Give the quantizer a shift, zero until it is set; every layer that reads it must be pointwise."""
        self.register_buffer("shift", torch.zeros_like(self.r))

    def centred(self, x: Tensor) -> Tensor:
        """x - shift."""
        return x if self.shift is None else x - along(self.shift, x.ndim, self.channel_dim)

    def begin_learning(self, reparameterize: bool) -> dict[str, list[nn.Parameter]]:
        """Make the steps, and r if asked, learnable; returns the new parameters by kind."""
        if self.headroom != 1:
            return {}
        self.log_delta = nn.Parameter(torch.zeros_like(self.delta))
        learned = {"steps": [self.log_delta]}
        if reparameterize and self.r.numel() > 1:
            self.log_r = nn.Parameter(torch.zeros_like(self.r))
            learned["r"] = [self.log_r]
        return learned

    @torch.no_grad()
    def end_learning(self) -> None:
        """Fold what was learned into `delta` and `r`."""
        delta, r = self.steps(), self.scales()
        self.log_delta = self.log_r = None
        self.delta.copy_(delta)
        self.r.copy_(r)

    def steps(self) -> Tensor:
        """(G,) current steps, differentiable in what is learned."""
        return self.delta if self.log_delta is None else self.delta * self.log_delta.exp()

    def scales(self) -> Tensor:
        """(C,) current r, its geometric mean unchanged by learning."""
        return self.r if self.log_r is None else self.r * (self.log_r - self.log_r.mean()).exp()

    def forward(self, x: Tensor) -> Tensor:
        """Shift and quantize (B, ...) values, each sample by its timestep group."""
        x = self.centred(x)
        if not self.enabled:
            return x
        current = self.groups.of_rows(x.shape[0])
        x = for_all_samples(x, len(current))
        step = per_sample(self.steps(), current, x.ndim)
        if self.r.numel() > 1:
            step = step * along(self.scales(), x.ndim, self.channel_dim)
        zero = per_sample(self.zero_point, current, x.ndim)
        return self._dropped(x, fake_quantize(x, step, -zero, 2**self.bits - 1 - zero, narrow=True))

    def _dropped(self, x: Tensor, quantized: Tensor) -> Tensor:
        """QDrop: a share of the elements as they were, while something is learned."""
        if self.drop_probability and torch.is_grad_enabled():  # units stay in evaluation mode throughout a fit
            return torch.where(torch.rand_like(x) < self.drop_probability, x, quantized)
        return quantized


class TokenQuantizer(ActivationQuantizer):
    """Dynamic quantizer: step and zero point of every token come from its own values at run time.

    Asymmetric: the step of a token that covers [min, max] is never larger than that of one that covers
    [-max|x|, max|x|], and half as large behind a GELU. r and the shift by channel are as in the static one; `delta` and
    `zero_point` are not used.
    """

    def begin_learning(self, reparameterize: bool) -> dict[str, list[nn.Parameter]]:
        """Make r learnable if asked; there are no steps to learn."""
        if not reparameterize or self.r.numel() == 1:
            return {}
        self.log_r = nn.Parameter(torch.zeros_like(self.r))
        return {"r": [self.log_r]}

    def forward(self, x: Tensor) -> Tensor:
        """Shift and quantize (..., C) tokens, each with a step of its own."""
        x = self.centred(x)
        if not self.enabled:
            return x
        r = along(self.scales(), x.ndim, self.channel_dim)
        with torch.no_grad():  # as constants: the straight-through gradient is that of values within the range
            scaled = x / r
            low, high = scaled.amin(self.channel_dim, keepdim=True), scaled.amax(self.channel_dim, keepdim=True)
            step, zero = affine_range(low, high, self.bits)  # (..., 1)
        return self._dropped(x, fake_quantize(x, step * r, -zero, 2**self.bits - 1 - zero, narrow=True))


_LOGARITHMIC: MutableMapping[Tensor, tuple[int | None, tuple[bool, ...]]] = WeakIdKeyDictionary()
"""By a quantizer's `tau`: its version, and which of its groups were logarithmic then."""


class SoftmaxQuantizer(LearnedSteps):
    """Quantizer of post-softmax values whose kind DAQ chooses for each timestep group (METHOD section 4).

    Attributes:
        delta: (G,) the uniform step, or the value of the logarithmic code 0.
        tau: (G,) exponent of the logarithmic quantizer; 0 where the group is uniform.
    """

    delta: Tensor
    tau: Tensor

    def __init__(self, bits: int, groups: TimestepGroups) -> None:
        super().__init__(torch.full((groups.num_groups,), 1.0 / (2**bits - 1)))
        self.bits = bits
        self.groups = groups
        self.enabled = True
        self.register_buffer("tau", torch.zeros(groups.num_groups))

    def forward(self, probabilities: Tensor) -> Tensor:
        """Quantize (B, ..., T) post-softmax values."""
        if not self.enabled:
            return probabilities
        delta, tau = (per_sample(t, self.groups.current, probabilities.ndim) for t in (self.steps(), self.tau))
        if torch.compiler.is_compiling():  # values decide nothing there
            return self._both(probabilities, delta, tau)
        single = self.groups.single
        logarithmic = self.logarithmic() if single is None else self.logarithmic()[single : single + 1]
        if not any(logarithmic):
            return self._uniform(probabilities, delta)
        if all(logarithmic):
            return log_fake_quantize(probabilities, delta, tau, self.bits)
        return (self._apart if probabilities.device.type == "cpu" else self._both)(probabilities, delta, tau)

    def logarithmic(self) -> tuple[bool, ...]:
        """Which groups are logarithmic, read from the device only after `tau` has changed."""
        version = None if self.tau.is_inference() else self.tau._version
        known = _LOGARITHMIC.get(self.tau)
        if known is None or version is None or known[0] != version:
            kinds = torch.zeros(self.tau.shape, dtype=torch.bool) if self.tau.is_meta else self.tau > 0
            known = version, tuple(kinds.tolist())
            _LOGARITHMIC[self.tau] = known
        return known[1]

    def _apart(self, x: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
        """The samples of each kind by themselves: the least work, but to count them the host waits for the device."""
        kinds = tau.flatten() > 0  # (B,)
        logarithmic, uniform = kinds.nonzero().squeeze(1), (~kinds).nonzero().squeeze(1)
        parts = [
            log_fake_quantize(x[logarithmic], delta[logarithmic], tau[logarithmic], self.bits),
            self._uniform(x[uniform], delta[uniform]),
        ]
        return torch.cat(parts)[torch.cat([logarithmic, uniform]).argsort()]

    def _both(self, x: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
        """Every sample by both kinds, and the right one chosen: the bits of `_apart`."""
        values = log_fake_quantize(x, delta, tau.where(tau > 0, 1.0), self.bits)
        return torch.where(tau > 0, values, self._uniform(x, delta))

    def _uniform(self, x: Tensor, delta: Tensor) -> Tensor:
        return fake_quantize(x, delta, delta.new_zeros(()), delta.new_full((), 2**self.bits - 1), narrow=True)
