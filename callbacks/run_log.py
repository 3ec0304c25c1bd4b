"""How a run goes and what it ends in, in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from callbacks.event_log import EventLog
from callbacks.image_grid import ImageGrid
from tcaq_lightning.calibration.callback import CalibrationCallback
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.config import Config
from tcaq_lightning.evaluation.denoiser_errors import IMAGE_FIGURES
from tcaq_lightning.evaluation.evaluate import Evaluation
from tcaq_lightning.evaluation.scores import row_of
from tcaq_lightning.models.pipelines import to_images
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.runtime.files import naming


class RunLog(CalibrationCallback):
    """Log the held-out errors of units, and the mismatch and the images of rounds.

    Args:
        writer: the run's event writer.
        reference: (N, C, H, W) full-precision samples of the held-out noises, for the image grids.
        grid_images: images in a grid.
    """

    def __init__(self, writer: SummaryWriter, reference: Tensor, grid_images: int) -> None:
        self.writer = writer
        self.reference = reference
        self.grid_images = grid_images

    def on_unit_initialized(self, *_: Any) -> None:
        """Bring what was logged of the unit to disk: a unit that is finished is not logged again."""
        self.writer.flush()

    def on_unit_end(self, visit: Visit, record: dict[str, Any]) -> None:
        """Log the held-out errors and the shares of undecided and flipped weights."""
        self.writer.add_scalar(f"held_out/{visit.tag}", record["before"], 0)
        self.writer.add_scalar(f"held_out/{visit.tag}", record.get("learned", record["after"]), 1)
        for key in ("undecided", "flipped"):
            if key in record:
                self.writer.add_scalar(f"{key}_share/{visit.tag}", record[key])

    def on_round_end(self, round_index: int, record: dict[str, Any], samples: Trajectories) -> None:
        """Log the mismatch by timestep and a grid of images from the same noise."""
        for step, value in ascending(record["timesteps"], record["mismatch"]):
            self.writer.add_scalar(f"mismatch/round{round_index}", value, step)
        self.writer.add_scalar("mismatch/mean", record["mean_mismatch"], round_index)
        grid = ImageGrid(self.writer, self.grid_images)
        grid.show("held_out_images", to_images(self.reference), to_images(samples.finals), round_index)
        self.writer.flush()


def ascending(timesteps: Sequence[float], values: Sequence[Any]) -> list[tuple[int, Any]]:
    """(whole timestep, value) in the order in which TensorBoard draws them.

    >>> ascending([500.0, 0.0], [0.1, 0.2])
    [(0, 0.2), (500, 0.1)]
    """
    return sorted(zip(whole_steps(timesteps), values, strict=True), key=lambda pair: pair[0])


def whole_steps(timesteps: Sequence[float]) -> list[int]:
    """Timesteps as the whole numbers that TensorBoard counts; those of a denoiser that takes t / 1000 in thousandths.

    >>> whole_steps([950.0, 0.0]), whole_steps([1.0, 0.25])
    ([950, 0], [1000, 250])
    """
    unit = 1 if max(timesteps) > 1 else 1000
    return [round(unit * t) for t in timesteps]


def log_results(writer: EventLog, config: Config, summary: Mapping[str, Any], metrics: Evaluation) -> None:
    """Write the final metrics with the run's hyperparameters, and the image grid.

    Args:
        writer: the run's event writer; closed afterwards.
        config: the run's configuration.
        summary: content of metrics.json.
        metrics: what was measured, with the samples of both models.
    """
    with naming(Path(writer.log_dir)):
        _log_results(writer, config, summary, metrics)


def _log_results(writer: EventLog, config: Config, summary: Mapping[str, Any], metrics: Evaluation) -> None:
    full, quantized = metrics.full_samples, metrics.quantized_samples
    if full is not None and quantized is not None:
        grid = ImageGrid(writer, config.logging.grid_images)
        grid.show("images", to_images(full), to_images(quantized), 0)
    noise, images = summary["noise_error"], summary["same_noise"]
    for step, value in ascending(noise["timesteps"], noise["relative"]):
        writer.add_scalar("noise_error/by_timestep", value, step)
    values = {"noise_error": noise["summary"]}
    values |= {f"image_{name}": images[name] for name in IMAGE_FIGURES}
    for name, record in summary["scores"].get("quantized", {}).items():
        values |= row_of(name, record).values
    hparams = {k: v for k, v in _flat(config.to_dict()).items() if isinstance(v, (bool, int, float, str))}
    finite = {f"final/{k}": v for k, v in values.items() if v is not None}
    writer.add_outcome(hparams, finite)
    writer.close()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
