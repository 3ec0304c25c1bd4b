"""Plots of the page that report.md does not have; all are drawn within `plot_style`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Literal

from tcaq_lightning.reports.figures import points
from tcaq_lightning.reports.html.events import Curve
from tcaq_lightning.reports.html.page import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.5
"""Inches of a wide plot. A plot of a gallery is half as wide."""
SMALL_WIDTH = 4.6
_ROW, _MARGIN = 0.19, 0.75
_LONGEST = 40
_MARKERS = ("o", "s", "^", "D", "v", "P")

Values = Sequence[float | None]


def _rows(labels: Sequence[str], xlabel: str, log: bool, width: float = WIDTH) -> tuple[Figure, Axes]:
    """Axes with one row for each label, the first on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, _MARGIN + _ROW * max(len(labels), 2)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), [plain(label) for label in labels], fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set(xlabel=xlabel, xscale="log" if log else "linear")
    axes.tick_params(axis="y", length=0)
    return figure, axes


def plain(text: str, longest: int = _LONGEST) -> str:
    """A text from a file as matplotlib is to draw it: its end if it is long, and no mathematics."""
    text = text if len(text) <= longest else f"…{text[-longest + 1 :]}"
    return "".join(c if c.isprintable() else "�" for c in text).replace("$", r"\$")


def _log_ticks(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """A logarithmic axis with numbers at 1, 2 and 5 where it spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    known = [v for v in values if v > 0]
    decades = math.log10(max(known) / min(known)) if known else 0.0
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axis.set_minor_formatter(NullFormatter())
    if decades < 2.5:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def bars(labels: Sequence[str], values: Values, xlabel: str) -> Figure:
    """One horizontal bar for each label; narrow enough for a small screen.

    Args:
        labels: one for each bar.
        values: lengths of the bars.
        xlabel: label of the axis.
    """
    figure, axes = _rows(labels, xlabel, log=False, width=SMALL_WIDTH)
    axes.barh(range(len(labels)), points(values), height=0.65, color=COLOURS[0])
    axes.grid(visible=False, axis="y")
    return figure


def ranking(labels: Sequence[str], values: Values, xlabel: str) -> Figure:
    """One dot for each label on a logarithmic axis, which has no start that a bar could begin at.

    Args:
        labels: one for each dot.
        values: positive.
        xlabel: label of the axis.
    """
    figure, axes = _rows(labels, xlabel, log=True)
    axes.plot([v if v > 0 else float("nan") for v in points(values)], range(len(labels)), "o", color=COLOURS[0])
    _log_ticks(axes, "x", points(values))
    return figure


def changes(
    labels: Sequence[str], pairs: Sequence[Sequence[float | None]], names: Sequence[str], xlabel: str
) -> Figure:
    """Two dots for each label, before and after, and a line between them, on a logarithmic axis.

    Args:
        labels: one for each line.
        pairs: (before, after), positive.
        names: of before and after.
        xlabel: label of the axis.
    """
    figure, axes = _rows(labels, xlabel, log=True)
    before, after = (
        [v if v > 0 else float("nan") for v in points([pair[side] for pair in pairs])] for side in range(2)
    )
    axes.hlines(range(len(labels)), before, after, color=INK, alpha=0.4, linewidth=1.5)
    axes.plot(before, range(len(labels)), "o", markerfacecolor="none", color=COLOURS[1], label=names[0])
    axes.plot(after, range(len(labels)), "o", color=COLOURS[0], label=names[1])
    _log_ticks(axes, "x", [*before, *after])
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def dots(labels: Sequence[str], series: Mapping[str, Values], xlabel: str, mark: float | None = None) -> Figure:
    """A dot of each series for each label.

    Args:
        labels: of the rows.
        series: by name, one value for each label.
        xlabel: of the values.
        mark: value with a line.
    """
    figure, axes = _rows(labels, xlabel, log=False)
    for (name, values), colour, marker in zip(series.items(), cycle(COLOURS), cycle(_MARKERS)):
        axes.plot(points(values), range(len(labels)), marker, color=colour, label=name, alpha=0.9)
    if mark is not None:
        axes.axvline(mark, color=INK, alpha=0.4, linewidth=1)
    figure.legend(loc="outside upper left", ncols=len(series))
    return figure


def losses(curves: Mapping[str, Curve], title: str) -> Figure:
    """A unit's reconstruction loss over the steps of each of its fits, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.3))
    figure.subplots_adjust(left=0.18, right=0.97, bottom=0.2, top=0.88)  # a layout engine is far slower
    axes = figure.subplots()
    for (name, (steps, values)), marker in zip(curves.items(), cycle(_MARKERS)):
        axes.plot(steps, [v if v > 0 else float("nan") for v in values], marker=marker, markersize=3, label=name)
    axes.set(xlabel="step", yscale="log", title=plain(title, 45))
    axes.tick_params(labelsize=8)
    _log_ticks(axes, "y", [v for _, values in curves.values() for v in values])
    axes.legend()
    return figure


def choice_map(labels: Sequence[str], chosen: Sequence[Sequence[bool]], differ: Sequence[Sequence[bool]]) -> Figure:
    """One row for each attention, one column for each timestep group: filled where logarithmic, crossed where in doubt.

    Args:
        labels: of the attentions.
        chosen: (A, G) logarithmic.
        differ: (A, G) the other rule would choose otherwise.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    figure, axes = _rows(labels, "timestep group (0 is the cleanest)", log=False)
    groups = len(chosen[0])
    colours = ListedColormap(["#9aa4b040", COLOURS[0]])
    axes.pcolormesh(
        [g - 0.5 for g in range(groups + 1)],
        [a - 0.5 for a in range(len(labels) + 1)],
        [[float(value) for value in row] for row in chosen],
        cmap=colours,
        vmin=0,
        vmax=1,
        edgecolors=INK,
        linewidth=0.3,
    )
    crosses = [(g, a) for a, row in enumerate(differ) for g, value in enumerate(row) if value]
    if crosses:
        axes.plot(*zip(*crosses, strict=True), "x", color=COLOURS[1], markersize=6, markeredgewidth=1.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def by_group(series: Mapping[str, Values], title: str, ylabel: str) -> Figure:
    """Values against the timestep group, one line for each series, on a logarithmic axis.

    Args:
        series: values of each timestep group, by the line's name.
        title: heading.
        ylabel: label of the vertical axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3.6, 2.3))
    figure.subplots_adjust(left=0.2, right=0.97, bottom=0.2, top=0.88)
    axes = figure.subplots()
    for (name, values), marker in zip(series.items(), cycle(_MARKERS)):
        drawn = [v if v > 0 else float("nan") for v in points(values)]
        axes.plot(range(len(drawn)), drawn, marker=marker, markersize=3, label=name)
    axes.set(xlabel="timestep group", ylabel=ylabel, yscale="log", title=plain(title, 45))
    _log_ticks(axes, "y", [v for values in series.values() for v in points(values)])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def grouped_bars(labels: Sequence[str], series: Mapping[str, Values], ylabel: str) -> Figure:
    """Vertical bars of all series side by side for each label.

    Args:
        labels: one for each group of bars.
        series: heights of the bars, by the series' name.
        ylabel: label of the vertical axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 2, 2.7), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        at = [i + (number - (len(series) - 1) / 2) * width for i in range(len(labels))]
        axes.bar(at, points(values), width=width * 0.92, label=plain(name), color=COLOURS[number % len(COLOURS)])
    axes.set_xticks(range(len(labels)), [plain(label) for label in labels])
    axes.set_ylabel(ylabel)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.25)
    axes.legend()
    return figure
