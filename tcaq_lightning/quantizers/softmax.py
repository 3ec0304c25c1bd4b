"""Quantizers of post-softmax values: kinds, and the quantizer that has one of them for each timestep group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tcaq_lightning.quantizers.activation import per_sample
from tcaq_lightning.quantizers.base import StoredTensor
from tcaq_lightning.quantizers.logarithmic import ADALOG_TAUS, log_fake_quantize
from tcaq_lightning.quantizers.range_search import search_affine, search_log
from tcaq_lightning.quantizers.steps import LearnedSteps
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.quantizers.uniform import fake_quantize
from tcaq_lightning.runtime.registry import Registry


class SoftmaxKind(ABC):
    """One way to quantize values in [0, 1] by two numbers for each timestep group, delta and tau.

    `SoftmaxQuantizer` computes delta q where tau is 0 and delta 2^(-tau q) where it is positive: kinds differ in what
    they search.
    """

    @abstractmethod
    def search(self, rows: Tensor, bits: int, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Search delta and tau of every row.

        Args:
            rows: (G, N) probabilities of each timestep group.
            bits: code width b.
            largest: (G,) largest probability of each group, of which `rows` is a subsample.

        Returns:
            (delta, tau), each (G,).
        """

    @abstractmethod
    def fake_quantize(self, x: Tensor, delta: Tensor, tau: Tensor, bits: int) -> Tensor:
        """Quantize and dequantize; `delta` and `tau` are broadcastable to `x`."""


class Uniform(SoftmaxKind):
    """Equal steps of delta; tau is 0."""

    def search(self, rows: Tensor, bits: int, largest: Tensor) -> tuple[Tensor, Tensor]:
        """The range of least error."""
        delta, _ = search_affine(rows, bits, limits=(torch.zeros_like(largest), largest))
        return delta, torch.zeros_like(delta)

    def fake_quantize(self, x: Tensor, delta: Tensor, tau: Tensor, bits: int) -> Tensor:
        """delta clip(round(x / delta), 0, 2^b - 1)."""
        return fake_quantize(x, delta, delta.new_zeros(()), delta.new_full((), 2**bits - 1), narrow=True)


@dataclass(frozen=True)
class Logarithmic(SoftmaxKind):
    """delta 2^(-tau q); see `logarithmic.py`.

    Attributes:
        taus: exponents that the search tries.
    """

    taus: tuple[float, ...]

    def search(self, rows: Tensor, bits: int, largest: Tensor) -> tuple[Tensor, Tensor]:
        """The delta and the exponent of least error."""
        return search_log(rows, bits, self.taus)

    def fake_quantize(self, x: Tensor, delta: Tensor, tau: Tensor, bits: int) -> Tensor:
        """In the log domain."""
        return log_fake_quantize(x, delta, tau, bits)


SOFTMAX_KINDS: Registry[SoftmaxKind] = Registry("daq.family")
"""By name; `daq.family` takes one that is not uniform."""
UNIFORM = SOFTMAX_KINDS.register("uniform")(Uniform())
SOFTMAX_KINDS.register("log2")(Logarithmic((1.0,)))
SOFTMAX_KINDS.register("log_sqrt2")(Logarithmic((0.5,)))
SOFTMAX_KINDS.register("adalog")(Logarithmic(ADALOG_TAUS))

_LOGARITHMIC: MutableMapping[Tensor, tuple[int | None, tuple[bool, ...]]] = WeakIdKeyDictionary()
"""By a quantizer's `tau`: its version, and which of its groups were logarithmic then."""


class SoftmaxQuantizer(LearnedSteps):
    """Quantizer of post-softmax values whose kind DAQ chooses for each timestep group (docs/method.md, "DAQ").

    Args:
        bits: code width b.
        groups: timestep groups of the denoiser.

    Attributes:
        delta: (G,) the uniform step, or the value of the logarithmic code 0.
        tau: (G,) exponent of the logarithmic quantizer; 0 where the group is uniform.
        enabled: off while statistics are taken.
    """

    kind: ClassVar[str] = "softmax"
    place: ClassVar[Literal["probabilities"]] = "probabilities"
    delta: Tensor
    tau: Tensor

    def __init__(self, bits: int, groups: TimestepGroups) -> None:
        super().__init__(torch.full((groups.num_groups,), 1.0 / (2**bits - 1)))
        self.bits = bits
        self.groups = groups
        self.enabled = True
        self.register_buffer("tau", torch.zeros(groups.num_groups))

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Steps and exponents."""
        return StoredTensor.plain("delta", self.delta), StoredTensor.plain("tau", self.tau)

    @torch.no_grad()
    def search(self, rows: Tensor, largest: Tensor, kind: str = "uniform") -> None:
        """Give every group a quantizer of one kind, of `SOFTMAX_KINDS`; arguments as in `SoftmaxKind.search`."""
        delta, tau = SOFTMAX_KINDS[kind].search(rows, self.bits, largest)
        self.delta.copy_(delta)
        self.tau.copy_(tau)

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
        return UNIFORM.fake_quantize(x, delta, delta, self.bits)
