"""Reconstruction of one unit: a LightningModule that holds the unit and nothing else (METHOD section 2)."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tcaq_lightning.calibration.entry_steps import EntrySteps
from tcaq_lightning.calibration.streams import Batch, UnitData
from tcaq_lightning.config import ReconstructionConfig
from tcaq_lightning.methods.sensitivity import beside_channels, channel_means, mean_squares
from tcaq_lightning.models.unit_outputs import Outputs, channel_count, output_tensors
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import output_quantizers, quant_layers, quantizers
from tcaq_lightning.quantizers import ActivationQuantizer, Rounding
from tcaq_lightning.quantizers.adaround import adaround_regularizer, annealed_beta, undecided_share
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.compilation import compiled
from tcaq_lightning.runtime.distributed.collectives import average_and_gather, total, world_size
from tcaq_lightning.runtime.kernels import Kernel
from tcaq_lightning.runtime.precision import autocasts

Phase = Literal["r", "v"]
"""r phase: log r and activation steps, weights to nearest. V phase: rounding and steps, r frozen."""


def block_error(output: Outputs, target: Outputs, weights: Tensor | None = None) -> Tensor:
    """Squared difference summed over channels, averaged over the rest (METHOD section 2).

    Args:
        output, target: (B, C, H, W), (B, T, C) or (B, C); of several outputs the errors are added.
        weights: (B, C) of the squares, the channels of several outputs in sequence; None weighs all of them 1.

    Returns:
        Scalar.

    >>> block_error(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    tensor(3.)
    """
    return weighted_error(channel_errors(output, target)[0], weights)


def weighted_error(squares: Tensor, weights: Tensor | None = None) -> Tensor:
    """The block error of (B, C) mean squares of each sample's channels; weights as in `block_error`."""
    return (squares if weights is None else squares * weights).sum(1).mean()


@Kernel
def _errors(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """output - target, and the means of its squares and of itself by sample and channel."""
    difference = output - target
    return difference, mean_squares(difference), channel_means(difference)


@Kernel
def _scale_by_channel(difference: Tensor, factor: Tensor) -> Tensor:
    return difference * beside_channels(factor, difference.ndim)


class _ChannelErrors(torch.autograd.Function):
    """Means of (output - target)^2, with their gradient, and of output - target, by sample and channel.

    Each pass over an output counts beside small units: autograd's own chain takes three times as many.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        difference, squares, means = _errors(output, target)
        ctx.save_for_backward(difference)
        ctx.mark_non_differentiable(means)
        return squares, means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        factor = grads[0] * (2 * grads[0].numel() / difference.numel())
        grad: Tensor = _scale_by_channel(difference, factor)
        return grad, None


def channel_errors(output: Outputs, target: Outputs) -> tuple[Tensor, Tensor]:
    """(B, C) means of squared errors and of errors, output - target, those of several outputs in sequence.

    Args:
        output, target: as in `block_error`. The gradient is that of the squares alone.
    """
    pairs = zip(output_tensors(output), output_tensors(target), strict=True)
    found = [_ChannelErrors.apply(x, y) for x, y in pairs]  # type: ignore[no-untyped-call]
    squares, errors = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return squares, errors


@torch.no_grad()
def gradient_scale(output: Outputs, error: Tensor, weights: Tensor | None = None) -> Tensor | None:
    """What a loss is multiplied with so that float16 can hold its gradients; None for other types.

    The block error is a mean over a batch's pixels or tokens, so that each one's gradient may be below what float16
    can hold. The factor, a power of 2, brings the root mean square of the output's gradient to about 1.

    Args:
        output: of the unit. error: its block error. weights: (B, C) as in `block_error`.

    >>> gradient_scale(torch.zeros(2, 4, 8, 4, dtype=torch.float16), torch.tensor(1.0))
    tensor(64.)
    """
    narrow = [x for x in output_tensors(output) if x.dtype is torch.float16]
    if not narrow:
        return None
    channels = sum(channel_count(tuple(x.shape[1:])) for x in narrow)
    places = sum(x.numel() for x in narrow) / channels
    square = 4 * error * (1.0 if weights is None else weights.mean()) / channels  # of 2 w (y - t), averaged
    exponent = (math.log2(places) - square.clamp(min=1e-30).log2() / 2).round()
    return torch.exp2(exponent.clamp(0, 40))


def draw_indices(count: int, batch_size: int, seeds: Sequence[int]) -> Tensor:
    """Samples of one step, with replacement, a function of `seeds` alone: a resumed fit draws the same ones.

    Args:
        count: number of samples to draw from.
        batch_size: number to draw.
        seeds: such as (seed, round, unit, step, rank).

    Returns:
        (batch_size,) long.
    """
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 6364136223846793005 + seed + 1442695040888963407) % 2**63
    return torch.randint(count, (batch_size,), generator=torch.Generator().manual_seed(mixed))


class BlockReconstruction(pl.LightningModule):
    """Learn one unit's quantization against its full-precision outputs.

    Nothing is learned but rounding logits, log r, and the logarithms of steps and scales. What is learned becomes
    part of the unit at the end of the fit, by `finish`.

    Args:
        unit: quantized unit, initialized.
        data: its calibration samples.
        train: numbers of the samples to learn from, among this rank's.
        context: timestep groups of the denoiser.
        config: rates and weights.
        phase: "r" or "v".
        iterations: optimisation steps.
        seeds: (seed, round, unit index), which with the step fix the samples drawn.
        shifted: layer whose bias correction follows the unit's mean error while it learns, and the factor from the
            unit's output to that layer's; None without bias correction.
        steps_before: steps that earlier phases of this round took, for progress bars.
    """

    def __init__(
        self,
        unit: nn.Module,
        data: UnitData,
        train: Tensor,
        context: TimestepGroups,
        config: ReconstructionConfig,
        phase: Phase,
        iterations: int,
        seeds: tuple[int, int, int],
        shifted: tuple[QuantLayer, float] | None = None,
        steps_before: int = 0,
    ) -> None:
        super().__init__()
        self.unit = unit
        self.data = data
        self.train_samples = train
        self.context = context
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
        self._gradient_scale: Tensor | None = None
        self._batches: Generator[Batch, None, None]
        self._coming: Batch | None = None
        self._residuals = torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)

    def _begin(self) -> None:
        rounding = Rounding.SOFT if self.phase == "v" else Rounding.NEAREST
        found: list[dict[str, list[nn.Parameter]]] = []
        for quantizer in quantizers(self.unit).values():
            if isinstance(quantizer, ActivationQuantizer):
                quantizer.drop_probability = self.config.qdrop
                found.append(quantizer.begin_learning(reparameterize=self.phase == "r"))
            else:
                found.append(quantizer.begin_learning())
        found += [
            layer.learned_weight.begin_learning(rounding, layer.input_quantizer.r)
            for layer in quant_layers(self.unit).values()
        ]
        found += [
            layer.output_quantizer.begin_learning()
            for layer in quant_layers(self.unit).values()
            if layer.output_quantizer is not None and layer.input_quantizer.headroom == 1
        ]
        for parameters in found:
            for kind, values in parameters.items():
                self.learned[kind] += values

    def finish(self) -> None:
        """Fold what was learned into the unit and round hard."""
        for quantizer in quantizers(self.unit).values():
            quantizer.end_learning()
            if isinstance(quantizer, ActivationQuantizer):
                quantizer.drop_probability = 0.0
        for outputs in output_quantizers(self.unit):
            outputs.end_learning()
        for layer in quant_layers(self.unit).values():
            layer.learned_weight.end_learning()
            if self.phase == "r":
                layer.search_weight()
        self.unit.eval()

    def train_dataloader(self) -> DataLoader[int]:
        """One epoch of bare step numbers: resuming in it replays nothing."""
        return DataLoader(range(self.iterations), batch_size=None)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the number of ranks: a fit goes on with that one only."""
        checkpoint["ranks"] = world_size()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with a rate for each kind of parameter, annealed to 0 but for V's."""
        rates = {
            "v": self.config.rounding_rate(self.iterations),
            "r": self.config.r_lr,
            "steps": self.config.step_lr,
            "weight_scales": self.config.scale_lr,
        }
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
        """Read the batches of all steps that are left."""
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
        """Cosine rates, a function of the step alone."""
        decay = 0.5 * (1 + math.cos(math.pi * self.global_step / self.iterations))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["initial"] * (1.0 if group["kind"] == "v" else decay)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """One step on freshly drawn samples, this rank's share of the batch."""
        if self.config.qdrop:
            primes = (1, 7919, 104729, 31, 1299709, 15485863)
            torch.manual_seed(sum(s * p for s, p in zip(self._seeds(self.global_step), primes, strict=True)))
        self._read()
        samples, self._coming = self._coming, None
        assert samples is not None  # there is a batch for every step
        narrow = autocasts(self.config.autocast, self.device, self.data.dtype)
        autocast = torch.autocast(self.device.type, torch.bfloat16) if narrow else nullcontext()
        with autocast, self._entry.forward(self.global_step):
            output = self.data.run_batch(self._unit_forward, self.context, samples)
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
        self._follow_mean_error(residuals, groups)

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

    @torch.no_grad()
    def _follow_mean_error(self, residual: Tensor, groups: Tensor) -> None:
        """Move the bias correction towards the mean error of each group, so that rounding is learned beside it."""
        if self.shifted is not None:
            layer, factor = self.shifted
            assert layer.bias_shift is not None
            counts = (groups[:, None] == groups).sum(1, keepdim=True)  # bincount would wait for the device
            share = self.config.bias_rate
            rate = share / (share * counts).clamp(min=1)  # many samples of a group must not overshoot
            layer.bias_shift.index_add_(0, groups, channel_means(residual) * rate, alpha=factor)

    def undecided(self) -> float:
        """Share of the unit's weights whose rounding is undecided yet."""
        logits = [layer.learned_weight.logits.detach().flatten() for layer in quant_layers(self.unit).values()]
        return undecided_share(torch.cat(logits)) if logits else 0.0


def _batches(samples: Tensor, size: int) -> Sequence[Tensor]:
    return torch.split(samples, size) if len(samples) else ()  # a rank may hold none of those that are looked at


@torch.no_grad()
def squared_errors(
    unit: nn.Module, data: UnitData, samples: Tensor, context: TimestepGroups, batch_size: int, device: torch.device
) -> Tensor:
    """(G, C) squared error of the unit as it is now, over all ranks' given samples; its sum is the block error."""
    sums = torch.zeros(context.num_groups, data.channels, dtype=torch.float64)
    for batch in data.batches(_batches(samples, batch_size), device):
        output = data.run_batch(unit, context, batch)
        squares, _ = channel_errors(output, batch.targets)
        sums.index_add_(0, batch.groups.cpu(), squares.double().cpu())
    return (total(sums) / total(torch.tensor(len(samples)))).float()


@torch.no_grad()
def mean_errors(
    unit: nn.Module,
    data: UnitData,
    samples: Tensor,
    context: TimestepGroups,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """(G, C) mean of target - output by timestep group and output channel over the given samples of all ranks.

    It is 0 for groups without samples.
    """
    sums = torch.zeros(context.num_groups, data.channels, dtype=torch.float64)
    counts = torch.zeros(context.num_groups, 1, dtype=torch.float64)
    for batch in data.batches(_batches(samples, batch_size), device):
        _, errors = channel_errors(data.run_batch(unit, context, batch), batch.targets)
        groups = batch.groups.cpu()
        sums.index_add_(0, groups, -errors.double().cpu())
        counts.index_add_(0, groups, torch.ones(len(groups), 1, dtype=torch.float64))
    return (total(sums) / total(counts).clamp(min=1)).float()
