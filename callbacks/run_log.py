"""What a run shows while it goes: progress on the console, everything else in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from callbacks.image_grid import ImageGrid
from callbacks.progress import Progress
from tcaq_lightning.calibration.initialize import Choices, Observations
from tcaq_lightning.config import Config
from tcaq_lightning.methods.daq import plot_tail
from tcaq_lightning.models.pipelines import to_images
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.nn.prepare import quantizers
from tcaq_lightning.quantizers import ActivationQuantizer
from tcaq_lightning.quantizers.statistics import range_heat_maps
from tcaq_lightning.runtime.files import naming


class RunLog:
    """Listener of the alignment loop.

    Args:
        progress: console bar.
        writer: event writer, or None where TensorBoard is off.
        reference: (N, C, H, W) full-precision samples of the held-out noises, for the image grids.
        grid_images: images in a grid.
    """

    def __init__(self, progress: Progress, writer: SummaryWriter | None, reference: Tensor, grid_images: int) -> None:
        self.progress = progress
        self.writer = writer
        self.reference = reference
        self.grid_images = grid_images

    def unit_started(self, round_index: int, position: int, name: str) -> None:
        """Move the bar."""
        self.progress.unit_started(round_index, position, name)

    def unit_initialized(self, tag: str, unit: nn.Module, observed: Observations, choices: Choices) -> None:
        """Draw ranges before and after TCR, and DAQ's fits and choices."""
        if self.writer is None:
            return
        modules = quantizers(unit)
        for name, ranges in observed.ranges.items():
            module = modules[name]
            assert isinstance(module, ActivationQuantizer)
            if module.r.numel() > 1:
                centred = ranges if module.shift is None else ranges.shifted(module.shift.cpu())
                after = centred.magnitude() / module.r.cpu()
                figure = range_heat_maps(ranges.magnitude(), after, f"{tag} {name}")
                self.writer.add_figure(f"ranges/{tag}/{name}", figure)
                self.writer.add_histogram(f"r/{tag}/{name}", module.r)
        for name, errors in choices.reparameterization.items():
            for label, value in zip(("r_1", "r_chosen"), errors, strict=True):
                self.writer.add_scalar(f"tcr_output_error/{tag}/{name}/{label}", value)
        for name, choice in choices.attention.items():
            histogram = observed.histograms[name]
            for group, fit in enumerate(choice.fits):
                self.writer.add_scalar(f"daq/{tag}/{name}/likelihood_ratio", fit.R, group)
                for label, values in (
                    ("logarithmic", choice.logarithmic),
                    ("uniform_error", choice.uniform_error),
                    ("log_error", choice.log_error),
                ):
                    self.writer.add_scalar(f"daq/{tag}/{name}/{label}", float(values[group]), group)
            for group in sorted({0, len(choice.fits) - 1}):
                title = f"{tag} {name}, group {group}"
                figure = plot_tail(histogram.counts[group], histogram.edges, choice.fits[group], title)
                self.writer.add_figure(f"daq/{tag}/{name}", figure, group)

    def unit_finished(self, round_index: int, position: int, record: dict[str, Any]) -> None:
        """Log the held-out errors and the shares of undecided and flipped weights."""
        self.progress.unit_finished(round_index, position, record)
        if self.writer is None:
            return
        tag = f"round{round_index}/{position:02d}-{record['unit']}"
        self.writer.add_scalar(f"held_out/{tag}", record["before"], 0)
        self.writer.add_scalar(f"held_out/{tag}", record.get("learned", record["after"]), 1)
        for key in ("undecided", "flipped"):
            if key in record:
                self.writer.add_scalar(f"{key}_share/{tag}", record[key])

    def round_finished(self, round_index: int, record: dict[str, Any], samples: Trajectories) -> None:
        """Log the mismatch by timestep and a grid of images from the same noise."""
        note = "" if record["kept"] else "; it did not fall, so the state before the round is kept"
        self.progress.console.print(
            f"round {round_index + 1}: mean held-out mismatch {record['mean_mismatch']:.4g}{note}", soft_wrap=True
        )
        if self.writer is None:
            return
        for step, value in zip(whole_steps(record["timesteps"]), record["mismatch"], strict=True):
            self.writer.add_scalar(f"mismatch/round{round_index}", value, step)
        self.writer.add_scalar("mismatch/mean", record["mean_mismatch"], round_index)
        grid = ImageGrid(self.writer, self.grid_images)
        grid.show("held_out_images", to_images(self.reference), to_images(samples.finals), round_index)
        self.writer.flush()


def whole_steps(timesteps: Sequence[float]) -> list[int]:
    """Timesteps as TensorBoard counts steps; of a denoiser that takes t / 1000, in thousandths.

    >>> whole_steps([950.0, 0.0]), whole_steps([1.0, 0.25])
    ([950, 0], [1000, 250])
    """
    unit = 1 if max(timesteps) > 1 else 1000
    return [round(unit * t) for t in timesteps]


def log_results(
    writer: SummaryWriter, config: Config, summary: Mapping[str, Any], full: Tensor, quantized: Tensor
) -> None:
    """Write the final metrics with the run's hyperparameters, and the image grid.

    Args:
        writer: the run's event writer; closed afterwards.
        config: the run's configuration.
        summary: content of metrics.json.
        full, quantized: (N, C, H, W) in [0, 1], from the same noise.
    """
    with naming(Path(writer.log_dir)):
        _log_results(writer, config, summary, full, quantized)


def _log_results(
    writer: SummaryWriter, config: Config, summary: Mapping[str, Any], full: Tensor, quantized: Tensor
) -> None:
    ImageGrid(writer, config.logging.grid_images).show("images", full, quantized, 0)
    noise, images, fid = summary["noise_error"], summary["same_noise"], summary["fid"]["quantized"]
    for step, value in zip(whole_steps(noise["timesteps"]), noise["relative"], strict=True):
        writer.add_scalar("noise_error/by_timestep", value, step)
    metrics = {"noise_error": noise["summary"], "image_mse": images["mse"], "image_psnr": images["psnr"]}
    metrics |= {"fid": fid["value"]} if fid else {}
    hparams = {k: v for k, v in _flat(config.to_dict()).items() if isinstance(v, (bool, int, float, str))}
    finite = {f"final/{k}": v for k, v in metrics.items() if v is not None}
    writer.add_hparams(hparams, finite, run_name=".")
    writer.close()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
