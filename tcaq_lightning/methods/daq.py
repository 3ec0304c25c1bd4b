"""DAQ: dynamically adaptive quantization of post-softmax values (docs/method.md, "DAQ").

Attention probabilities are many and small, or few and large, and which of the two depends on the layer and the
timestep. So each attention and timestep group gets the quantizer that suits it, uniform or logarithmic (TCAQ-DM, Huang
et al., AAAI 2025, arXiv:2412.16700):

1. while a unit is observed, its probabilities are streamed into a histogram with logarithmic bins (`LogHistogram`);
2. a power law and an exponential are fitted to its tail (`decide_by_likelihood`, `daq_tails.py`);
3. both quantizers are searched on probes, and the errors that they make in the attention's output P v are measured;
4. a rule decides from these: `daq.rule`, one of `RULES`.

`choose_softmax` does 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcaq_lightning.config import DAQConfig
from tcaq_lightning.methods.daq_tails import TailFit, fit_tails
from tcaq_lightning.quantizers import SOFTMAX_KINDS, SoftmaxKind, SoftmaxQuantizer
from tcaq_lightning.quantizers.observers import LogHistogram
from tcaq_lightning.quantizers.timestep_groups import values_by_group
from tcaq_lightning.runtime.registry import Registry

__all__ = ["LogHistogram", "TailFit", "choose_softmax", "decide_by_likelihood"]

VALUES = 8192
"""Probabilities of each timestep group in the searches."""


@dataclass(frozen=True)
class Evidence:
    """What speaks for either quantizer of one attention's probabilities.

    Attributes:
        fits: one fitted tail per group.
        uniform_error: (G,) relative error of P^ v under the uniform quantizer, searched for each group.
        log_error: (G,) the same under the logarithmic one.
    """

    fits: list[TailFit]
    uniform_error: Tensor
    log_error: Tensor


RULES: Registry[Callable[[Evidence], Tensor]] = Registry("daq.rule")
"""By the name that `daq.rule` takes: evidence -> (G,) bool, logarithmic or not."""


@RULES.register("likelihood")
def by_likelihood(evidence: Evidence) -> Tensor:
    """Logarithmic where a power law fits the tail better than an exponential: R_g > 0 (the published rule)."""
    return torch.tensor([fit.R > 0 for fit in evidence.fits], device=evidence.log_error.device)


@RULES.register("error")
def by_error(evidence: Evidence) -> Tensor:
    """Logarithmic where that quantizer makes the smaller error in the attention's output."""
    return evidence.log_error < evidence.uniform_error


@dataclass
class AttentionChoice:
    """What DAQ decided for one attention.

    Attributes:
        logarithmic: (G,) the choice made.
        by_likelihood: (G,) what the published rule would choose.
        by_error: (G,) what the smaller error would choose.
        uniform_error: (G,) relative error of P^ v under the uniform quantizer.
        log_error: (G,) the same under the logarithmic one.
        fits: one fitted tail per group.
    """

    logarithmic: Tensor
    by_likelihood: Tensor
    by_error: Tensor
    uniform_error: Tensor
    log_error: Tensor
    fits: list[TailFit]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, one for each timestep group."""
        names = ("logarithmic", "by_likelihood", "by_error", "uniform_error", "log_error")
        values = {name: getattr(self, name).tolist() for name in names}
        return values | {"R": [fit.R for fit in self.fits], "reliable": [fit.reliable for fit in self.fits]}


def choose_softmax(
    quantizer: SoftmaxQuantizer, p: Tensor, values: Tensor, fits: list[TailFit], config: DAQConfig
) -> AttentionChoice:
    """Search both quantizers for every group, compare them, and set the one that the rule chooses.

    Args:
        quantizer: of the probabilities.
        p: (B, heads, T, S) probabilities of probes, sorted by group with equal counts, or (B, k, heads, T, S) of k rows
            of each.
        values: (B, S, C) what they weigh, the attention's v, with k B rows or heads apart where `p` has them.
        fits: one fitted tail per group.
        config: rule and logarithmic family; with `enabled` off every group is uniform.

    Raises:
        UserError: `daq.rule` or `daq.family` is not registered.
    """
    num_groups, bits = quantizer.delta.numel(), quantizer.bits
    rows = values_by_group(p, num_groups, VALUES)
    largest = p.reshape(num_groups, -1).amax(1)
    uniform, logarithmic = SOFTMAX_KINDS["uniform"], SOFTMAX_KINDS[config.family]
    found = [kind.search(rows, bits, largest) for kind in (uniform, logarithmic)]
    error = _OutputError(p, values, num_groups)
    errors = [error(kind, *tables, bits) for kind, tables in zip((uniform, logarithmic), found, strict=True)]
    evidence = Evidence(fits, *errors)
    chosen = RULES[config.rule](evidence)
    if not config.enabled:
        chosen = torch.zeros_like(chosen)
    for buffer, by_uniform, by_logarithmic in zip((quantizer.delta, quantizer.tau), *found, strict=True):
        buffer.copy_(torch.where(chosen, by_logarithmic, by_uniform))
    return AttentionChoice(
        chosen.cpu(),
        by_likelihood(evidence).cpu(),
        by_error(evidence).cpu(),
        evidence.uniform_error.cpu(),
        evidence.log_error.cpu(),
        fits,
    )


class _OutputError:
    """Relative error of an attention's output, ||(P^ - P) v||^2 / ||P v||^2 by timestep group.

    Args:
        p: (B, heads, T, S) probabilities, sorted by group with equal counts, or (B, k, heads, T, S).
        values: (B, S, C) v of all heads in sequence, (k B, S, C), or (k B, heads, S, C / heads).
        num_groups: G.
    """

    def __init__(self, p: Tensor, values: Tensor, num_groups: int) -> None:
        self.p = p.flatten(0, -4) if p.ndim > 4 else p  # (k B, heads, T, S)
        self.v = self._by_heads(values)  # (k B, heads, S, C/heads)
        self.num_groups = num_groups
        self.reference = self._by_sample(lambda p, _: p)

    def _by_heads(self, values: Tensor) -> Tensor:
        rows, heads = self.p.shape[0], self.p.shape[1]
        if values.ndim == 3 and values.shape[0] == rows:
            return torch.unflatten(values, 2, (heads, -1)).transpose(1, 2)
        v = torch.unflatten(values, 0, (rows, -1)) if values.ndim == 3 else values  # rows that are heads of a sample
        return v.repeat_interleave(heads // v.shape[1], 1)

    def _by_sample(self, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Outputs of one sample after another: all probabilities may fill the memory, without further copies."""
        samples = (slice(i, i + 1) for i in range(len(self.p)))
        return torch.cat([function(self.p[i], i) @ self.v[i] for i in samples])

    def __call__(self, kind: SoftmaxKind, delta: Tensor, tau: Tensor, bits: int) -> Tensor:
        """(G,) errors of a kind of quantizer with its delta and tau, both (G,)."""
        each = len(self.p) // self.num_groups
        steps, taus = (table.repeat_interleave(each).view(-1, 1, 1, 1) for table in (delta, tau))  # (B, 1, 1, 1)
        difference = self._by_sample(lambda p, i: kind.fake_quantize(p, steps[i], taus[i], bits) - p)
        by_group = [x.square().reshape(self.num_groups, -1).sum(1) for x in (difference, self.reference)]
        relative: Tensor = by_group[0] / by_group[1].clamp(min=1e-30)
        return relative


def decide_by_likelihood(histogram: LogHistogram) -> list[TailFit]:
    """Choose the quantizer family of every timestep group of one attention layer by likelihood.

    R_g = mean log-likelihood of the power law - that of the exponential, on the tail; R_g > 0: "log", else "uniform"
    (docs/method.md, "DAQ"). The family is `TailFit.kind`.

    Args:
        histogram: post-softmax values of the layer, over all samples and ranks.

    Returns:
        One fit for each group; groups without a tail to fit are "uniform" with `reliable` False.

    >>> histogram = LogHistogram(num_groups=2)
    >>> x = torch.linspace(0.0005, 0.9995, 1000)
    >>> power_law, exponential = (1000 ** (x - 1))[None], -x.log()[None] / 20
    >>> histogram.update(torch.cat([power_law, exponential.clamp(max=1)]), torch.tensor([0, 1]))
    >>> [fit.kind for fit in decide_by_likelihood(histogram)]
    ['log', 'uniform']
    """
    return fit_tails(histogram.counts, histogram.edges)
