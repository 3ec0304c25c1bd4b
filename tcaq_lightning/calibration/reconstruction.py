"""Reconstruction of one unit by a LightningModule that holds the unit alone (docs/method.md, "Learned rounding")."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tcaq_lightning.calibration.bias_correction import ShiftedLayer, follow_mean_error
from tcaq_lightning.calibration.entry_steps import EntrySteps
from tcaq_lightning.calibration.losses import channel_errors, gradient_scale, weighted_error
from tcaq_lightning.calibration.unit_data import Batch, UnitData
from tcaq_lightning.config import ReconstructionConfig
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.quantizers import Rounding
from tcaq_lightning.quantizers.adaround import adaround_regularizer, annealed_beta, undecided_share
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.compilation import compiled
from tcaq_lightning.runtime.distributed.collectives import average_and_gather, world_size
from tcaq_lightning.runtime.precision import autocasts
from tcaq_lightning.runtime.seeds import derive

Phase = Literal["r", "v"]
"""r phase: log r and activation steps, weights to nearest. V phase: rounding and steps, r frozen."""


def draw_indices(count: int, batch_size: int, seeds: Sequence[int]) -> Tensor:
    """Draw the samples of one step, with replacement.

    They depend on `seeds` alone, so a resumed fit draws the same ones.

    Args:
        count: number of samples to draw from.
        batch_size: number to draw.
        seeds: such as (seed, round, unit, step, rank).

    Returns:
        (batch_size,) long.
    """
    return torch.randint(count, (batch_size,), generator=torch.Generator().manual_seed(derive(*seeds)))


class BlockReconstruction(pl.LightningModule):
    """Learn one unit's quantization against its full-precision outputs.

    Only rounding logits, log r, and the logarithms of steps and scales are learned. `finish` makes them part of the
    unit at the end of the fit.

    Args:
        unit: quantized unit, initialized.
        data: its calibration samples.
        train: indices of the samples to learn from, among this rank's.
        timestep_groups: those of the denoiser.
        config: rates and weights.
        phase: "r" or "v".
        iterations: optimisation steps.
        seeds: (seed, round, unit index), which with the step fix the samples drawn.
        shifted: layer whose bias correction follows the unit's mean error while it learns; None without bias
            correction.
        steps_before: steps that earlier phases of this round took, for progress bars.
    """

    def __init__(
        self,
        unit: nn.Module,
        data: UnitData,
        train: Tensor,
        timestep_groups: TimestepGroups,
        config: ReconstructionConfig,
        phase: Phase,
        iterations: int,
        seeds: tuple[int, int, int],
        shifted: ShiftedLayer | None = None,
        steps_before: int = 0,
    ) -> None:
        super().__init__()
        self.unit = unit
        self.data = data
        self.train_samples = train
        self.timestep_groups = timestep_groups
        self.config = config
        self.phase = phase
        self.iterations = iterations
        self.seeds = seeds
        self.shifted = shifted
        self.steps_before = steps_before
        self.learned: dict[str, list[nn.Parameter]] = {"v": [], "r": [], "steps": [], "weight_scales": []}
        self._begin()
        self._entry = EntrySteps(unit, 1 if config.compile else config.input_steps_every)
        self._unit_forward = compiled(unit) if config.compile else unit.__call__
        self.losses: dict[str, Tensor] = {}
        self.started = False
        self._gradient_scale: Tensor | None = None
        self._batches: Generator[Batch, None, None]
        self._coming: Batch | None = None
        self._residuals = torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)

    def _begin(self) -> None:
        rounding = Rounding.SOFT if self.phase == "v" else Rounding.NEAREST
        found = [q.begin_learning(self.phase == "r", self.config.qdrop) for q in quantizers(self.unit).values()]
        found += [layer.begin_learning(rounding) for layer in quant_layers(self.unit).values()]
        for parameters in found:
            for kind, values in parameters.items():
                self.learned[kind] += values

    def finish(self) -> None:
        """Fold what was learned into the unit and round hard."""
        for quantizer in quantizers(self.unit).values():
            quantizer.end_learning()
        for layer in quant_layers(self.unit).values():
            layer.end_learning()
            if self.phase == "r":
                layer.search_weight()
        self.unit.eval()

    def train_dataloader(self) -> DataLoader[int]:
        """One epoch of bare step numbers: resuming in it replays nothing."""
        return DataLoader(range(self.iterations), batch_size=None)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the number of ranks: a fit resumes only with the same number."""
        checkpoint["ranks"] = world_size()

    @property
    def _rates(self) -> dict[str, float]:
        return {
            "v": self.config.rounding_rate(self.iterations),
            "r": self.config.r_lr,
            "steps": self.config.step_lr,
            "weight_scales": self.config.scale_lr,
        }

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn: a unit may be kept in full precision, or all its rates be 0."""
        return any(parameters and self._rates[kind] > 0 for kind, parameters in self.learned.items())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with a rate for each kind of parameter; all but that of V are annealed to 0."""
        rates = self._rates
        for kind, parameters in self.learned.items():
            for parameter in parameters:
                parameter.requires_grad_(rates[kind] > 0)
        groups: list[dict[str, Any]] = [
            {"params": parameters, "lr": rates[kind], "initial": rates[kind], "kind": kind}
            for kind, parameters in self.learned.items()
            if parameters and rates[kind] > 0
        ]
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.Adam(groups, fused=fused, foreach=not fused)

    def on_train_start(self) -> None:
        """Start to read the batches of the remaining steps."""
        self.started = True
        steps = range(self.global_step, self.iterations)
        self._batches = self.data.batches(map(self._draw, steps), self.device)

    def on_train_end(self) -> None:
        """Stop reading."""
        self._batches.close()

    def _read(self) -> None:
        """Have the next step's samples at hand, if there is a next step."""
        if self._coming is None:
            with torch.enable_grad():  # gradients are exchanged without: views made there could not be written to later
                self._coming = next(self._batches, None)

    def _seeds(self, step: int) -> tuple[int, ...]:
        return (*self.seeds, ord(self.phase), step, self.global_rank)

    def _draw(self, step: int) -> Tensor:
        size = self.config.batch_size // world_size()
        return self.train_samples[draw_indices(len(self.train_samples), size, self._seeds(step))]

    def on_train_batch_start(self, batch: int, batch_idx: int) -> None:
        """Set the cosine rates, which depend on the step alone."""
        decay = 0.5 * (1 + math.cos(math.pi * self.global_step / self.iterations))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["initial"] * (1.0 if group["kind"] == "v" else decay)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """One step on freshly drawn samples, this rank's share of the batch."""
        if self.config.qdrop:
            torch.manual_seed(derive(*self._seeds(self.global_step), 1))  # other numbers than those of the draw
        self._read()
        samples, self._coming = self._coming, None
        assert samples is not None  # there is a batch for every step
        narrow = autocasts(self.config.autocast, self.device, self.data.dtype)
        autocast = torch.autocast(self.device.type, torch.bfloat16) if narrow else nullcontext()
        with autocast, self._entry.forward(self.global_step):
            output = self.data.run_batch(self._unit_forward, self.timestep_groups, samples)
        squares, errors = channel_errors(output, samples.targets)  # in the targets' type, which is none too narrow
        error = weighted_error(squares, samples.weights)
        self._residuals = errors.neg(), samples.groups
        self._gradient_scale = gradient_scale(output, error, samples.weights)
        self.losses = {"reconstruction": error.detach()}
        return error if self._gradient_scale is None else error * self._gradient_scale

    def on_after_backward(self) -> None:
        """Average gradients over the ranks, add the regulariser's, and follow the mean error of all samples."""
        self._entry.after_backward(self.global_step)
        if self._gradient_scale is not None:
            for gradient in (p.grad for values in self.learned.values() for p in values if p.grad is not None):
                gradient /= self._gradient_scale
        residuals, groups = self._residuals
        if world_size() > 1:
            averaged = [p.grad for kind in self.learned.values() for p in kind if p.grad is not None]
            rows = torch.cat([groups[:, None].to(residuals), residuals], dim=1)  # (B, 1 + C)
            rows = average_and_gather([*averaged, self.losses["reconstruction"]], rows, self._read)
            groups, residuals = rows[:, 0].long(), rows[:, 1:]
        self.regularize()
        if self.shifted is not None:
            follow_mean_error(self.shifted, residuals, groups, self.config.bias_rate)

    def regularize(self) -> None:
        """Add the gradient of the rounding regulariser, which is the same on all ranks."""
        beta = annealed_beta(self.global_step / self.iterations, warmup=self.config.warmup)
        if self.phase == "r" or math.isinf(beta) or not self.config.rounding_weight:
            return
        settings = torch.tensor([beta, self.config.rounding_weight], device=self.device).unbind()
        penalties = []
        for v in self.learned["v"]:
            if v.grad is not None:
                penalty, v.grad = adaround_regularizer(v, v.grad, *settings)
                penalties.append(penalty)
        if penalties:
            self.losses["rounding"] = settings[1] * torch.stack(penalties).sum()

    def undecided(self) -> float:
        """Share of the unit's weights whose rounding is still undecided."""
        logits = [layer.learned_weight.logits.detach().flatten() for layer in quant_layers(self.unit).values()]
        return undecided_share(torch.cat(logits)) if logits else 0.0
