"""Reparameterizations: exact changes of a layer's operands that quantization profits from, and the search among them.

X' = (X - shift) / r and W' = W diag(r) leave a full-precision layer's output unchanged, the layer adding the constant
W shift. Which r is worth having is what methods differ in: TCR (`tcr.py`), SmoothQuant (`smoothquant.py`) and others
propose candidates; `choose` takes the one whose output error is smallest with both operands quantized.

A further one is a class in a file of its own:

    @REPARAMETERIZATIONS.register("mine")
    class Mine(Reparameterization):
        def candidates(self, ranges, weights):
            return torch.stack([torch.ones_like(weights), ranges.magnitude().amax(0).sqrt()])

and `tcr.formula: mine` takes it (docs/extending.md, "A method").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tcaq_lightning.config import TCRConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.quantizers import ActivationQuantizer
from tcaq_lightning.quantizers.activation import along
from tcaq_lightning.quantizers.observers import RangeStatistics
from tcaq_lightning.runtime.registry import Registry

QUICK_VALUES = 1024
"""Values per timestep group that a candidate's range is searched on: it only ranks candidates; the chosen one's range
is searched anew on more."""
QUICK_PLACES = 3000
"""Pixels or tokens that candidates are compared on, if half of the probes have as many."""


class Reparameterization(ABC):
    """A rule that proposes factors r for the channels of a layer's input.

    Args:
        config: the run's `tcr`; None takes the defaults.

    Attributes:
        truncation: R_trunc, `tcr.truncation`: r should lie in [1 / truncation, truncation].
    """

    def __init__(self, config: TCRConfig | None = None) -> None:
        self.config = config or TCRConfig()
        self.truncation = self.config.truncation

    def shifts(self, ranges: RangeStatistics) -> list[Tensor]:
        """Shifts that are tried beside none, where all layers that read the input are pointwise.

        Args:
            ranges: as in `candidates`.

        Returns:
            (C,) each; float16 must hold their values, since the artifact does.
        """
        return []

    @abstractmethod
    def candidates(self, ranges: RangeStatistics, weights: Tensor) -> Tensor:
        """Factors that are worth a try.

        A single one is taken as it is. With a row of ones among several, the layer never gets worse than it was.

        Args:
            ranges: smallest and largest value, (G, C) `low` and `high`, of each channel of the input less its shift, in
                each timestep group; `ranges.magnitude()` is the largest magnitude.
            weights: (C,) largest magnitude of the weights that meet each channel.

        Returns:
            (K, C), positive.
        """


REPARAMETERIZATIONS: Registry[type[Reparameterization]] = Registry("tcr.formula")
"""By the name that `tcr.formula` takes."""


def named(config: TCRConfig) -> dict[str, Reparameterization]:
    """The reparameterizations that `tcr.formula` names, each set up.

    Args:
        config: the run's `tcr`.

    Raises:
        UserError: a name is not registered.
    """
    names = [config.formula] if isinstance(config.formula, str) else config.formula
    return {name: REPARAMETERIZATIONS[name](config) for name in names}


def normalized(r: Tensor, truncation: float) -> Tensor:
    """Scale r to geometric mean 1 over its last axis, then clip to [1 / truncation, truncation].

    >>> normalized(torch.tensor([1.0, 4.0]), truncation=10.0)
    tensor([0.5000, 2.0000])
    """
    log_r = r.clamp(min=1e-12).log()
    return (log_r - log_r.mean(-1, keepdim=True)).exp().clamp(1 / truncation, truncation)


@dataclass(frozen=True)
class Candidate:
    """X' = (X - shift) / r and W' = W diag(r).

    It is folded into what is there already: the input's quantizer has steps of s_g r_d, the weight is W r on its grid
    divided by r (`AdaRoundWeight`), and W shift is a constant of the layer (`QuantLayer.set_shift`).

    Attributes:
        r: (C,), positive.
        shift: (C,).
    """

    r: Tensor
    shift: Tensor

    def put_into(self, quantizer: ActivationQuantizer) -> None:
        """Make it the input's; the ranges have to be searched afterwards."""
        quantizer.r.copy_(self.r)
        if quantizer.shift is not None:
            quantizer.shift.copy_(self.shift)


def choose(
    quantizer: ActivationQuantizer,
    layers: Sequence[QuantLayer],
    x: Tensor,
    ranges: RangeStatistics,
    members: dict[str, Reparameterization],
) -> tuple[float, float]:
    """Choose r, and a shift where there may be one, by the layers' output error with both operands quantized.

    The choice is put into the quantizer. Its range is left to be searched anew, on more values.

    Args:
        quantizer: of the input; r has a value for each channel.
        layers: those that read it.
        x: (B, ...) probes in full precision, sorted by timestep group with equal counts.
        ranges: of the input's channels in each group, over all samples.
        members: whose candidates are compared, by name.

    Returns:
        The errors of r = 1 without a shift and of the choice, relative to the output's power.

    Raises:
        UserError: candidates of another shape, or not positive.
    """
    places = x.numel() // x.shape[quantizer.channel_dim]
    x, groups = fewer_probes(x, quantizer.groups.current, ranges.low.shape[0], places)
    error_of = OutputError(quantizer, layers, x, groups, ranges)
    unchanged = Candidate(torch.ones_like(quantizer.r), torch.zeros_like(quantizer.r))
    pool = _pool(quantizer, layers, x.device, ranges, members)
    found = [error_of(candidate) for candidate in pool]
    best = min(range(len(pool)), key=found.__getitem__)
    known = [error for candidate, error in zip(pool, found, strict=True) if _same(candidate, unchanged)]
    before = known[0] if known else error_of(unchanged)
    pool[best].put_into(quantizer)
    return before, found[best]


class OutputError:
    """Squared error of what layers make of one input, both operands quantized, relative to the output's power.

    Args:
        quantizer: of the input; each call leaves its candidate in it.
        layers: those that read it.
        x: (B, ...) probes in full precision.
        groups: (B,) their timestep groups.
        ranges: of the input's channels in each group.
    """

    def __init__(
        self,
        quantizer: ActivationQuantizer,
        layers: Sequence[QuantLayer],
        x: Tensor,
        groups: Tensor,
        ranges: RangeStatistics,
    ) -> None:
        self.quantizer = quantizer
        self.layers = layers
        self.x = x
        self.groups = groups
        self.ranges = ranges
        powers = (self._output(layer, x).square().sum() for layer in layers)
        self.power = max(sum(map(float, powers)), 1e-30)
        self._shift: Tensor | None = None
        self._targets: list[Tensor] = []

    @staticmethod
    def _output(layer: QuantLayer, x: Tensor) -> Tensor:
        return layer.linear_map(x, layer.learned_weight.weight, None)

    def __call__(self, candidate: Candidate) -> float:
        """The error of one candidate."""
        if self._shift is not candidate.shift:  # candidates of one shift come in sequence
            self._shift, self._targets = candidate.shift, []
            centred = self.x - along(candidate.shift, self.x.ndim, self.quantizer.channel_dim)
            self._targets = [self._output(layer, centred) for layer in self.layers]
        candidate.put_into(self.quantizer)
        self.quantizer.search(self.x, self.ranges, QUICK_VALUES, candidates=8, norm=2)
        with self.quantizer.groups.using(self.groups):
            quantized = self.quantizer(self.x)
        error = 0.0
        for layer, target in zip(self.layers, self._targets, strict=True):
            output = layer.linear_map(quantized, layer.learned_weight.nearest(candidate.r), None)
            error += float(output.sub_(target).square_().sum())
        return error / self.power


def _pool(
    quantizer: ActivationQuantizer,
    layers: Sequence[QuantLayer],
    device: torch.device,
    ranges: RangeStatistics,
    members: dict[str, Reparameterization],
) -> list[Candidate]:
    """All candidates of all members, those of one shift in sequence."""
    weights = weight_magnitude(layers, quantizer.r.numel())
    pool: list[Candidate] = []
    for name, member in members.items():
        shifts = [torch.zeros_like(quantizer.r)]
        if quantizer.shift is not None:
            shifts += [shift.to(quantizer.shift) for shift in member.shifts(ranges)]
        for shift in shifts:
            grid = member.candidates(ranges.shifted(shift.cpu()).to(device), weights)
            if grid.ndim != 2 or grid.shape[1] != len(weights) or not bool((grid > 0).all() and grid.isfinite().all()):
                raise UserError(
                    f"tcr.formula: the candidates of {name} must be (K, {len(weights)}), finite and positive, got "
                    f"{tuple(grid.shape)} with values in [{float(grid.min()):g}, {float(grid.max()):g}]"
                )
            pool += [Candidate(r, shift) for r in grid]
    return pool


def _same(one: Candidate, other: Candidate) -> bool:
    return torch.equal(one.r, other.r.to(one.r)) and torch.equal(one.shift, other.shift.to(one.shift))


def fewer_probes(x: Tensor, groups: Tensor, num_groups: int, places: int) -> tuple[Tensor, Tensor]:
    """Half of each group's probes where those are enough, else all of them, and their timestep groups.

    Args:
        x: (B, ...) one row a probe, sorted by group with equal counts; any other number of rows is kept.
        groups: (B,).
        num_groups: G.
        places: pixels or tokens of x.
    """
    each = len(groups) // num_groups
    if len(x) != len(groups) or each == 1 or places < 2 * QUICK_PLACES:
        return x, groups
    chosen = torch.arange(len(groups), device=x.device).view(num_groups, each)[:, ::2].flatten()
    return x[chosen], groups[chosen]


def weight_magnitude(layers: Sequence[QuantLayer], channels: int) -> Tensor:
    """(C,) largest magnitude of the weights that meet each input channel.

    Args:
        layers: that read the input.
        channels: C.
    """
    per_layer = []
    for layer in layers:
        weight, conv_groups = layer.learned_weight.weight, layer.learned_weight.conv_groups  # (O, C / groups, ...)
        blocks = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
        per_layer.append(blocks.view(conv_groups, -1, blocks.shape[1]).amax(1).reshape(channels))
    return torch.stack(per_layer).amax(0)
