"""DAQ's choice for one attention: both quantizers of its probabilities are searched, compared, and one is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcaq_lightning.config import DAQConfig
from tcaq_lightning.methods.daq import TailFit
from tcaq_lightning.quantizers import SoftmaxQuantizer
from tcaq_lightning.quantizers.logarithmic import ADALOG_TAUS, log_fake_quantize
from tcaq_lightning.quantizers.range_search import search_affine, search_log
from tcaq_lightning.quantizers.timestep_groups import values_by_group
from tcaq_lightning.quantizers.uniform import fake_quantize

VALUES = 8192
"""Probabilities of each timestep group in the searches."""

LOG_FAMILIES: dict[str, tuple[float, ...]] = {"log2": (1.0,), "log_sqrt2": (0.5,), "adalog": ADALOG_TAUS}
"""Exponents tau that each member of the logarithmic family may take."""


@dataclass
class AttentionChoice:
    """What DAQ decided for one attention.

    Attributes:
        logarithmic: (G,) the choice made. by_likelihood, by_error: (G,) what either rule would choose.
        uniform_error, log_error: (G,) relative error of P^ v under either quantizer.
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


def set_softmax(
    quantizer: SoftmaxQuantizer, p: Tensor, values: Tensor, fits: list[TailFit], config: DAQConfig
) -> AttentionChoice:
    """Search both quantizers for every group, compare them, choose."""
    num_groups, bits = quantizer.delta.numel(), quantizer.bits
    rows = values_by_group(p, num_groups, VALUES)
    uniform_delta, _ = search_affine(rows, bits, limits=(p.new_zeros(num_groups), p.reshape(num_groups, -1).amax(1)))
    log_delta, tau = search_log(rows, bits, LOG_FAMILIES[config.family])

    heads = p.shape[1]
    v = torch.unflatten(values, 2, (heads, -1)).transpose(1, 2)  # (B, heads, S, C/heads)
    expand = p.shape[0] // num_groups
    reference = _by_sample(lambda i: p[i] @ v[i], len(p))

    def error(quantize: Callable[[Tensor, slice], Tensor]) -> Tensor:
        difference = _by_sample(lambda i: (quantize(p[i], i) - p[i]) @ v[i], len(p))
        by_group = [x.square().reshape(num_groups, -1).sum(1) for x in (difference, reference)]
        relative: Tensor = by_group[0] / by_group[1].clamp(min=1e-30)
        return relative

    def spread(table: Tensor, i: slice) -> Tensor:
        return table.repeat_interleave(expand)[i].view(-1, 1, 1, 1)

    levels = uniform_delta.new_tensor(2**bits - 1)
    uniform_error = error(lambda x, i: fake_quantize(x, spread(uniform_delta, i), levels * 0, levels))
    log_error = error(lambda x, i: log_fake_quantize(x, spread(log_delta, i), spread(tau, i), bits))
    by_likelihood = torch.tensor([fit.R > 0 for fit in fits], device=p.device)
    by_error = log_error < uniform_error
    chosen = {"likelihood": by_likelihood, "error": by_error}[config.rule]
    if not config.enabled:
        chosen = torch.zeros_like(chosen)
    quantizer.delta.copy_(torch.where(chosen, log_delta, uniform_delta))
    quantizer.tau.copy_(torch.where(chosen, tau, torch.zeros_like(tau)))
    return AttentionChoice(
        chosen.cpu(), by_likelihood.cpu(), by_error.cpu(), uniform_error.cpu(), log_error.cpu(), fits
    )


def _by_sample(function: Callable[[slice], Tensor], samples: int) -> Tensor:
    """Results for one sample after another: the probabilities of all may fill the memory, without further copies."""
    return torch.cat([function(slice(i, i + 1)) for i in range(samples)])
