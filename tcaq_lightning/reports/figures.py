"""Figures that report.md and report.html both show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tcaq_lightning.reports.headline import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_noise_error(noise: Record) -> Figure:
    """Relative and mean error of the noise against the timestep.

    Args:
        noise: `noise_error` of `Evaluation.to_dict()`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5))
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.14, top=0.95, wspace=0.3)  # a layout engine is far slower
    error, bias = figure.subplots(1, 2)
    draw_relative_error(error, noise)
    draw_bias(bias, noise)
    return figure


def draw_relative_error(axes: Axes, noise: Record) -> None:
    """Relative error of the noise against the timestep, on a logarithmic axis."""
    axes.plot(noise["timesteps"], points(noise["relative"]), ".-")
    axes.set(xlabel="t", ylabel="relative noise error", yscale="log")
    axes.invert_xaxis()


def draw_bias(axes: Axes, noise: Record) -> None:
    """Mean error of the noise against the timestep."""
    axes.plot(noise["timesteps"], points(noise["bias"]), ".-")
    axes.axhline(0, color="0.8", linewidth=1)
    axes.set(xlabel="t", ylabel="mean noise error")
    axes.invert_xaxis()


def plot_mismatch(rounds: Sequence[Record]) -> Figure:
    """Mismatch of the two samplers' x_t against the timestep, one line for each round.

    Args:
        rounds: as in `write_report`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5))
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.14, top=0.95)
    axes = figure.subplots()
    for record in rounds:
        label = f"round {record['round']}" + ("" if record["kept"] else " (not kept)")
        # At the first step both samplers start from the same noise: 0 has no place on a logarithmic axis.
        values = [v or float("nan") for v in points(record["mismatch"])]
        axes.plot(record["timesteps"], values, ".-", label=label)
    axes.set(xlabel="t", ylabel="relative distance of x_t", yscale="log")
    axes.invert_xaxis()
    axes.legend()
    return figure


def points(values: Sequence[float | None]) -> list[float]:
    """Values to draw: NaN, which leaves a gap, for what is not finite."""
    return [float("nan") if v is None else v for v in values]
