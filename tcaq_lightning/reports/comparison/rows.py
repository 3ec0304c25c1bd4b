"""Rows of a comparison: finished runs of one model, measured alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tcaq_lightning.calibration.run_dir import lookup
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.scores import row_of
from tcaq_lightning.reports.comparison.paired import Paired, compare_paired, mean_interval
from tcaq_lightning.reports.finished_run import FinishedRun

ALIKE = (
    "model.path",
    "model.variant",
    "seed",
    "conditioning",
    "calibration.sampler",
    *(f"evaluation.{key}" for key in ("num_trajectories", "num_images", "sampler", "fid_samples", "features")),
)
"""Keys that must agree: runs that differ there were measured on other samples."""
ITS_OWN = ("run_dir", "cache_dir", "trainer", "logging", "evaluation")
"""Keys in which runs may differ without a word."""


@dataclass(frozen=True)
class Row:
    """A method at some bits.

    Attributes:
        method: its name.
        bits: such as `w4a4`.
        run: what its run has left.
    """

    method: str
    bits: str
    run: FinishedRun

    @property
    def noise(self) -> Mapping[str, Any]:
        """`noise_error` of metrics.json."""
        found: Mapping[str, Any] = self.run.metrics["noise_error"]
        return found

    @property
    def images(self) -> Mapping[str, Any]:
        """`same_noise` of metrics.json."""
        found: Mapping[str, Any] = self.run.metrics["same_noise"]
        return found


@dataclass(frozen=True)
class Error:
    """A mean error of a row.

    Attributes:
        value: the mean.
        interval: its 95 % interval; None where an error is not finite.
        to_first: beside the first row of the same bits; None of that row itself, and where an error is not finite.
    """

    value: float | None
    interval: tuple[float, float] | None
    to_first: Paired | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        first = self.to_first
        beside = None if first is None else {"ratio": first.ratio, "interval": [first.low, first.high]}
        return {
            "value": self.value,
            "interval": None if self.interval is None else list(self.interval),
            "to_first": beside,
            "better_than_first": None if first is None else first.better,
        }


@dataclass(frozen=True)
class Compared:
    """A row's figures.

    Attributes:
        row: whose they are.
        noise: of the noise, by held-out trajectory.
        images: clipped MSE of same-noise images.
        psnr: of all images at once, in dB; None where the images are equal or not finite.
        scores: of the quantized model's images, as texts by label.
        size: bytes of the quantized denoiser on disk.
        seconds: of all stages.
        peak_memory: bytes, the largest that the run's process had resident; None where it was not taken down.
        differing: dotted keys of the configuration in which the row differs from the first one of its bits.
    """

    row: Row
    noise: Error
    images: Error
    psnr: float | None
    scores: Mapping[str, str]
    size: int
    seconds: float
    peak_memory: int | None
    differing: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "method": self.row.method,
            "bits": self.row.bits,
            "run_dir": str(self.row.run.directory),
            "noise_error": self.noise.to_dict(),
            "image_mse": self.images.to_dict(),
            "psnr": self.psnr,
            "scores": dict(self.scores),
            "bytes": self.size,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "differing": dict(self.differing),
        }


def compare_rows(rows: Sequence[Row]) -> list[Compared]:
    """Figures of all rows; each is held against the first row of its bits.

    Args:
        rows: in the order of the table.

    Raises:
        UserError: runs of different models, or that were measured on other samples.
    """
    for row in rows:
        _check_alike(rows[0], row)
    return [_compared(row, next(first for first in rows if first.bits == row.bits)) for row in rows]


def _check_alike(first: Row, row: Row) -> None:
    for key in ALIKE:
        expected, got = (lookup(each.run.manifest["config"], key) for each in (first, row))
        if expected != got:
            raise UserError(
                f"{row.run.directory}: {key} is {got!r}, but {expected!r} in {first.run.directory}; only runs of one "
                "model that are measured alike can be compared"
            )
    if row.run.metrics.get("noise_error") is None or row.run.metrics.get("same_noise") is None:
        raise UserError(f"{row.run.directory} has no noise error or images; expected evaluation.num_images above 0")


def _compared(row: Row, first: Row) -> Compared:
    metrics = row.run.metrics
    scores = (row_of(name, record) for name, record in (metrics["scores"].get("quantized") or {}).items())
    return Compared(
        row=row,
        noise=_error(row.noise, first.noise, "summary", "by_trajectory"),
        images=_error(row.images, first.images, "mse", "by_image"),
        psnr=row.images["psnr"],
        scores={score.label: score.text for score in scores},
        size=metrics["bytes"]["quantized"],
        seconds=sum(metrics["stages"].values()),
        peak_memory=metrics.get("peak_memory"),
        differing=dict(_differing(row.run.manifest["config"], first.run.manifest["config"])),
    )


def _error(own: Mapping[str, Any], first: Mapping[str, Any], total: str, parts: str) -> Error:
    """A mean error with its interval, and beside the first row's; earlier versions wrote no parts."""
    errors, others = (record.get(parts) or [] for record in (own, first))
    known = bool(errors) and None not in errors
    interval = mean_interval(errors) if known else None
    paired = known and own is not first and None not in others and len(others) == len(errors)
    return Error(own[total], interval, compare_paired(errors, others) if paired else None)


def _differing(own: Any, first: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys whose values differ, with the row's own; what names or places the run is left out."""
    for key, value in own.items():
        name = f"{prefix}{key}"
        other = first.get(key)
        if name in ITS_OWN or value == other:
            continue
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _differing(value, other, f"{name}.")
        else:
            yield name, value
