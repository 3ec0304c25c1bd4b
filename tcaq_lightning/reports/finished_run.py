"""What a finished run has left in its directory, read and checked before anything is drawn from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tcaq_lightning.calibration.run_dir import read_manifest
from tcaq_lightning.calibration.run_files import RunFiles
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.denoiser_errors import IMAGE_FIGURES
from tcaq_lightning.methods.daq import TailFit
from tcaq_lightning.quantizers.observers import RangeStatistics
from tcaq_lightning.reports.headline import headline
from tcaq_lightning.runtime.files import DamagedFileError
from tcaq_lightning.runtime.json_files import read_json
from tcaq_lightning.runtime.json_shape import FLAG, MEASURED, NUMBER, TEXT, Named, Optional, check_shape
from tcaq_lightning.runtime.one_line import one_line

T = TypeVar("T")
Record = Mapping[str, Any]

_BY_GROUP = {
    "logarithmic": [FLAG],
    "by_likelihood": [FLAG],
    "by_error": [FLAG],
    "uniform_error": [MEASURED],
    "log_error": [MEASURED],
    "R": [MEASURED],
    "reliable": [FLAG],
}
_ROUND = {"round": NUMBER, "timesteps": [NUMBER], "mismatch": [MEASURED], "mean_mismatch": MEASURED, "kept": FLAG}
_ROUND["iterations"] = Optional(NUMBER)  # earlier versions did not write it
_UNIT = {
    "round": NUMBER,
    "position": NUMBER,
    "unit": TEXT,
    "kept": FLAG,
    "before": MEASURED,
    "after": MEASURED,
    "learned": MEASURED,
    "undecided": MEASURED,
    "flipped": MEASURED,
    "attention": Optional(Named(_BY_GROUP)),
    "tcr_output_error": Optional(Named([MEASURED])),
}
_BY_SAMPLE = Optional([MEASURED])  # earlier versions did not write it
_NOISE = {"summary": MEASURED, "timesteps": [NUMBER], "relative": [MEASURED], "bias": [MEASURED]}
# Earlier versions wrote `mse`, of unclipped samples, and `psnr` alone.
_IMAGES = {"num_images": NUMBER, **dict.fromkeys(IMAGE_FIGURES, MEASURED)}
METRICS_SHAPE = {
    "noise_error": Optional(_NOISE | {"by_trajectory": _BY_SAMPLE}),
    "same_noise": Optional(_IMAGES | {"by_image": _BY_SAMPLE}),
    "fid": Optional(Named(Optional({}))),
    "scores": Optional(Named(Named({}))),
    "sampler": Optional({"num_steps": NUMBER, "eta": NUMBER}),
    "bytes": Optional({"full": NUMBER, "quantized": NUMBER}),
    "peak_memory": MEASURED,
    "stages": Named(NUMBER),
    "rounds": [_ROUND],
    "units": [_UNIT],
    "coverage": [{"name": TEXT, "kind": TEXT, "bits": TEXT, "note": TEXT, "parameters": NUMBER}],
}
"""What this report reads of metrics.json."""


@dataclass(frozen=True)
class UnitStatistics:
    """What calibration saw of a unit before it set anything, and the TCR that it ended with.

    Attributes:
        ranges: by input quantizer, (G, C) each.
        r: (C,) or (1,), by the same names.
        shift: (C,) or None, by the same names.
        counts: by softmax quantizer, (G, 1 + bins) histogram.
        edges: of the histograms, (2 + bins,), or None without any.
        fits: one for each group, by the names of `counts`.
    """

    ranges: dict[str, RangeStatistics]
    r: dict[str, Tensor]
    shift: dict[str, Tensor | None]
    counts: dict[str, Tensor]
    edges: Tensor | None
    fits: dict[str, list[TailFit]]


@dataclass
class FinishedRun:
    """A finished run.

    Attributes:
        directory: RUN_DIR.
        manifest: content of manifest.json, checked.
        metrics: content of metrics.json, checked.
        statistics: by unit in execution order; empty for runs that kept none.
        notes: one line for each file that is damaged and was left out.
    """

    directory: Path
    manifest: dict[str, Any]
    metrics: dict[str, Any]
    statistics: dict[str, UnitStatistics] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> RunFiles:
        """Its files."""
        return RunFiles(self.directory, self.manifest.get("run", ""))

    @property
    def units(self) -> list[Record]:
        """Records of the units, one for each round."""
        units: list[Record] = self.metrics["units"]
        return units

    @property
    def rounds(self) -> list[Record]:
        """Records of the rounds."""
        rounds: list[Record] = self.metrics["rounds"]
        return rounds


def read_finished(directory: Path) -> FinishedRun:
    """Read what a finished run has left.

    Args:
        directory: RUN_DIR of `train.py`.

    Raises:
        UserError: no run there, an unfinished one, or a damaged manifest.json or metrics.json.
    """
    manifest_path = directory / "manifest.json"
    if not manifest_path.is_file():
        raise UserError(f"{directory} holds no run: expected the run_dir of train.py, with a manifest.json")
    manifest = read_manifest(manifest_path)
    if not manifest.get("finished"):
        raise UserError(
            f"{directory} is not finished: expected a run that has written its metrics.json; repeat its command, "
            f"python train.py --config {directory / 'config.yaml'}, which goes on where it stopped"
        )
    run = FinishedRun(directory, manifest, _read_metrics(directory / "metrics.json"))
    for unit in run.units:
        if unit["round"] == 0:
            found = _noting(run, lambda unit=unit: _read_statistics(run.files, unit))  # type: ignore[misc]
            if found is not None:
                run.statistics[unit["unit"]] = found
    return run


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = read_json(path, parse_constant=_refuse)
        check_shape(metrics, METRICS_SHAPE, "it")
        _collect_scores(metrics)
        _check_lengths(metrics)
        headline(metrics)  # what a metric recorded, it must be able to show
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: expected what the finished run wrote; put a copy of it back") from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise UserError(
            f"{path} is damaged: expected what the run wrote, got {one_line(error)}; put a copy of it back"
        ) from error
    checked: dict[str, Any] = metrics
    return checked


def _collect_scores(metrics: dict[str, Any]) -> None:
    """Put FID among the other scores: earlier versions wrote it beside them."""
    for images, record in (metrics.pop("fid", None) or {}).items():
        if record is not None:
            scores = metrics.setdefault("scores", {})
            scores[images] = {"fid": record, **scores.get(images, {})}


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant}, which is no JSON number")


def _check_lengths(metrics: Record) -> None:
    """Check that what belongs together has one length."""
    if noise := metrics.get("noise_error"):
        _check_same("noise_error", [noise[key] for key in ("timesteps", "relative", "bias")])
    for record in metrics["rounds"]:
        _check_same("rounds", [metrics["rounds"][0]["timesteps"], record["timesteps"], record["mismatch"]])
    for unit in metrics["units"]:
        for name, choice in (unit.get("attention") or {}).items():
            _check_same(f"attention {name} of {unit['unit']}", list(choice.values()))
        for name, errors in (unit.get("tcr_output_error") or {}).items():
            _check_same(f"tcr_output_error {name} of {unit['unit']}", [errors, [0, 0]])


def _check_same(where: str, lists: Sequence[Any]) -> None:
    lengths = [len(values) for values in lists if isinstance(values, list)]
    if len(set(lengths)) > 1:
        raise ValueError(f"expected lists of one length in {where}, got lengths {lengths}")


def _noting(run: FinishedRun, read: Callable[[], T]) -> T | None:
    """What `read` gives, or None and a note if its file is damaged."""
    try:
        return read()
    except DamagedFileError as error:
        run.notes.append(f"{error}; what it holds is left out here")
        return None


def _read_statistics(files: RunFiles, unit: Record) -> UnitStatistics | None:
    """Statistics of a unit and its final r and shift; None if the run kept none."""
    visit = Visit(0, int(unit["position"]), unit["unit"])
    statistics, state_file = files.statistics(visit), files.unit(visit)
    if not statistics.exists():
        return None
    tensors, record = statistics.load()
    state, _ = state_file.load() if state_file.exists() else ({}, None)
    try:
        return statistics_of(tensors, record, state)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{statistics.path} does not fit its unit: {one_line(error)}") from error


def statistics_of(tensors: Mapping[str, Tensor], record: Any, state: Mapping[str, Tensor]) -> UnitStatistics:
    """Statistics from the content of their file, with r and shift from the unit's state.

    Args:
        tensors: as `Observations.tensors` made them.
        record: as `Observations.to_dict` made it.
        state: of the unit, as in its file.

    Raises:
        KeyError, TypeError, ValueError: they do not fit each other.
    """
    names = sorted(key.removesuffix(":low") for key in tensors if key.endswith(":low"))
    ranges, r, shift = {}, {}, {}
    for name in names:
        low, high = tensors[f"{name}:low"], tensors[f"{name}:high"]
        ranges[name] = RangeStatistics(*low.shape)
        ranges[name].low, ranges[name].high = low, high
        r[name], shift[name] = state[f"{name}.r"], state.get(f"{name}.shift")
        if r[name].numel() not in {1, low.shape[1]} or high.shape != low.shape:
            raise ValueError(f"{name} has r of {r[name].numel()} channels and ranges of {tuple(low.shape)}")
    counts = {key.removesuffix(":counts"): tensors[key] for key in sorted(tensors) if key.endswith(":counts")}
    fits = {name: [TailFit(**fit) for fit in values] for name, values in record["fits"].items()}
    if any(len(fits[name]) != len(rows) for name, rows in counts.items()):
        raise ValueError("expected one fit for each group")
    return UnitStatistics(ranges, r, shift, counts, tensors.get("edges"), fits)
