"""Sections of the page about what was set before anything was learned: TCR and DAQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tcaq_lightning.reports.finished_run import FinishedRun, UnitStatistics
from tcaq_lightning.reports.html import charts
from tcaq_lightning.reports.html.events import Events
from tcaq_lightning.reports.html.page import (
    Block,
    Cards,
    Column,
    Figure,
    Gallery,
    Section,
    Table,
    Text,
    drawn,
    note,
    number,
    plot_style,
    png,
)
from tcaq_lightning.reports.html.sections import MOST_ROWS, or_nothing, unfolded
from tcaq_lightning.reports.range_heat_maps import range_heat_maps
from tcaq_lightning.reports.tail_plot import plot_tail

MOST_FIGURES = 160
"""Figures of one kind that the page holds, in the model's order."""


def tcr(run: FinishedRun, events: Events) -> Section:
    """What reparameterization did to output errors and ranges."""
    section = Section("tcr", "TCR: ranges before and after")
    found = [
        (f"{unit['unit']}.{name}".removesuffix(".input_quantizer"), *errors)
        for unit in run.units
        for name, errors in (unit.get("tcr_output_error") or {}).items()
    ]
    if found:
        section.blocks += _output_errors(found)
    spreads = {
        f"{unit}.{name}".removesuffix(".input_quantizer"): (channel_spread(before), channel_spread(after))
        for unit, statistics in run.statistics.items()
        for name, (before, after) in magnitudes(statistics).items()
    }
    if spreads:
        section.blocks += _spreads(spreads)
    maps = _heat_maps(run) if run.statistics else _logged_heat_maps(events)
    if maps:
        section.blocks.append(
            Text(
                "The maps show log10 of the largest magnitude of each channel (across) in each timestep group "
                "(down, 0 is the cleanest)."
            )
        )
    section.blocks += unfolded(maps, f"Ranges of each channel by timestep group, {len(maps)} inputs", MOST_FIGURES)
    if section.blocks and not found:
        section.blocks.insert(0, note("TCR was off: inputs are neither shifted nor divided by r."))
    return or_nothing(section, "The run recorded no ranges: TCR was off, or it logged nothing to TensorBoard.")


def _output_errors(found: list[tuple[str, float | None, float | None]]) -> list[Block]:
    worst = sorted(found, key=lambda row: -(row[1] or 0.0))[:MOST_ROWS]
    with plot_style():
        plot = charts.changes(
            [row[0] for row in worst],
            [row[1:] for row in worst],
            ("r = 1, no shift", "chosen r and shift"),
            "relative output error of the layer, both operands quantized",
        )
    caption = (
        f"The {len(worst)} of {len(found)} inputs with the largest error without TCR; a longer line to the left is a "
        "larger gain. r = 1 is among the candidates, so that no line goes to the right."
    )
    rows = [
        (name, before, after, after / before if before and after is not None else None) for name, before, after in found
    ]
    columns = [
        Column("input of", "code"),
        Column("error at r = 1", "number"),
        Column("error as chosen", "number"),
        Column("ratio", "times"),
    ]
    known = [(before, after) for _, before, after in found if before is not None and after is not None]
    means = [sum(pair[side] for pair in known) / max(len(known), 1) for side in range(2)]
    return [
        Cards(
            [
                ("mean output error, r = 1", number(means[0])),
                ("mean output error, chosen", number(means[1])),
                ("inputs that TCR changed", f"{sum(b != a for b, a in known)} of {len(found)}"),
            ]
        ),
        drawn(plot, caption, "Output errors of layers before and after TCR", wide=True),
        Table("All inputs, in execution order.", columns, rows, folded=True),
    ]


def magnitudes(statistics: UnitStatistics) -> dict[str, tuple[Tensor, Tensor]]:
    """(G, C) largest magnitudes before and after shift and division by r, of inputs that have an r by channel."""
    found = {}
    for name, ranges in statistics.ranges.items():
        r, shift = statistics.r[name], statistics.shift[name]
        if r.numel() > 1:
            centred = ranges if shift is None else ranges.shifted(shift)
            found[name] = ranges.magnitude(), centred.magnitude() / r
    return found


def channel_spread(magnitude: Tensor) -> float | None:
    """How unequal channels are: the largest magnitude of a channel over the median channel's, mean over the groups.

    Args:
        magnitude: (G, C).

    >>> import torch
    >>> channel_spread(torch.tensor([[1.0, 1.0, 4.0], [2.0, 2.0, 4.0]]))
    3.0
    """
    middle = magnitude.median(dim=1).values
    seen = middle > 0
    return float((magnitude.amax(1)[seen] / middle[seen]).mean()) if bool(seen.any()) else None


def _spreads(spreads: Mapping[str, tuple[float | None, float | None]]) -> list[Block]:
    order = sorted(spreads, key=lambda name: -(spreads[name][0] or 0.0))[:MOST_ROWS]
    with plot_style():
        plot = charts.changes(
            order,
            [spreads[name] for name in order],
            ("before", "after shift and r"),
            "largest channel over the median channel",
        )
    caption = (
        f"The {len(order)} of {len(spreads)} inputs whose channels were least equal. At 1 all channels fill the "
        "quantizer's range alike. Weights take up what r takes from the activations, so that the best r is not the one "
        "that equalizes most."
    )
    rows = [(name, *pair) for name, pair in spreads.items()]
    columns = [Column("input of", "code"), Column("spread before", "times"), Column("spread after", "times")]
    return [
        drawn(plot, caption, "Spread of channels before and after TCR", wide=True),
        Table("Spread of channels, all inputs.", columns, rows, folded=True),
    ]


_MAP_CAPTION = "{}: above as it comes in, below after shift and division by r; even colours are easy to quantize."


def _heat_maps(run: FinishedRun) -> list[Figure]:
    figures: list[Figure] = []
    for unit, statistics in run.statistics.items():
        for name, (before, after) in magnitudes(statistics).items():
            if len(figures) < MOST_FIGURES:
                title = f"{unit}.{name}".removesuffix(".input_quantizer")
                with plot_style():
                    plot = range_heat_maps(before, after, "", (4.6, 3.4))
                figures.append(drawn(plot, _MAP_CAPTION.format(title), f"Two heat maps of ranges, input of {title}"))
    return figures


def _logged_heat_maps(events: Events) -> list[Figure]:
    """Those of a run that kept no statistics, as it logged them."""
    return [
        png(content, _MAP_CAPTION.format(tag), f"Two heat maps of ranges, {tag}")
        for tag, content in events.pictures_under("ranges/").items()
    ][:MOST_FIGURES]


Choice = tuple[str, Mapping[str, Any]]
"""Name of an attention, and what DAQ recorded of it."""


def daq(run: FinishedRun, events: Events) -> Section:
    """DAQ's choices, errors and fits."""
    section = Section("daq", "DAQ: attention probabilities")
    found: list[Choice] = [
        (f"{unit['unit']}.{name}".removesuffix(".processor.probabilities"), choice)
        for unit in run.units
        for name, choice in (unit.get("attention") or {}).items()
        if choice["logarithmic"]
    ]
    if not found:
        return or_nothing(section, "The model has no quantized attention, or the run recorded none.")
    config = run.manifest["config"]["daq"]
    if not config["enabled"]:
        section.blocks.append(note("DAQ was off: all probabilities are uniform. Below is what it would have gone by."))
    section.blocks.append(
        Text(
            "For each attention and timestep group the probabilities are uniform or logarithmic, here by the rule "
            f"“{config['rule']}”. The likelihood rule takes logarithmic where a power law fits the tail better than an "
            "exponential (R > 0); the error rule compares the relative errors of P v."
        )
    )
    if len({len(choice["logarithmic"]) for _, choice in found}) == 1:
        section.blocks.append(_choice_map(found))
    fits = _tails(run) if run.statistics else _logged_tails(events)
    section.blocks += [_choice_table(found), Gallery(_choice_errors(found)[:MOST_FIGURES])]
    section.blocks += unfolded(fits, f"Fitted tails of the distributions, {len(fits)} figures", MOST_FIGURES)
    return section


def _disagreement(choice: Mapping[str, Any]) -> list[bool]:
    """By timestep group, whether the two rules choose differently."""
    return [x != y for x, y in zip(choice["by_likelihood"], choice["by_error"], strict=True)]


def _choice_map(found: Sequence[Choice]) -> Figure:
    """All choices at a glance."""
    with plot_style():
        plot = charts.choice_map(
            [label for label, _ in found],
            [choice["logarithmic"] for _, choice in found],
            [_disagreement(choice) for _, choice in found],
        )
    caption = "Blue is logarithmic, grey uniform. A cross marks a group in which the two rules disagree."
    return drawn(plot, caption, "Map of DAQ's choices by attention and timestep group", wide=True)


def _choice_table(found: Sequence[Choice]) -> Table:
    """Means over the timestep groups, a row for each attention."""
    rows = []
    for label, choice in found:
        chosen, uniform, log = (choice[key] for key in ("logarithmic", "uniform_error", "log_error"))
        as_chosen = [b if logarithmic else a for a, b, logarithmic in zip(uniform, log, chosen, strict=True)]
        differ = _disagreement(choice)
        shares = sum(chosen) / len(chosen), 1 - sum(differ) / len(differ)
        rows.append((label, *shares, *map(mean_known, (uniform, log, as_chosen, choice["R"]))))
    columns = [
        Column("attention", "code"),
        Column("logarithmic", "percent"),
        Column("rules agree", "percent"),
        Column("uniform error", "number"),
        Column("log error", "number"),
        Column("error as chosen", "number"),
        Column("mean R", "number"),
    ]
    return Table("Means over the timestep groups.", columns, rows)


def _choice_errors(found: Sequence[Choice]) -> list[Figure]:
    """Errors under either quantizer, a figure for each attention."""
    figures = []
    for label, choice in found:
        series = {"uniform": choice["uniform_error"], "logarithmic": choice["log_error"]}
        with plot_style():
            plot = charts.by_group(series, label, "relative error of P v")
        caption = f"{label}: error of P v under either quantizer; the error rule chooses the lower line."
        figures.append(drawn(plot, caption, caption))
    return figures


def mean_known(values: list[float | None]) -> float | None:
    """Mean of the values that were finite; None without any."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


_TAIL_CAPTION = (
    "{}: density of the probabilities and both fits of their tail, from the vertical line on. "
    "R > 0 asks for logarithmic."
)


def _tails(run: FinishedRun) -> list[Figure]:
    """The first and the last timestep group of each attention."""
    figures: list[Figure] = []
    for unit, statistics in run.statistics.items():
        if statistics.edges is None:
            continue
        for name, counts in statistics.counts.items():
            label = f"{unit}.{name}".removesuffix(".processor.probabilities")
            for group in sorted({0, len(counts) - 1}):
                title = f"{label}, timestep group {group}"
                with plot_style():
                    plot = plot_tail(
                        counts[group], statistics.edges, statistics.fits[name][group], charts.plain(title, 60)
                    )
                figures.append(drawn(plot, _TAIL_CAPTION.format(title), f"Distribution and fits, {title}"))
    return figures


def _logged_tails(events: Events) -> list[Figure]:
    """Those of a run that kept no statistics: TensorBoard has the last group of each attention."""
    return [
        png(content, _TAIL_CAPTION.format(tag), f"Distribution and fits, {tag}")
        for tag, content in events.pictures_under("daq/").items()
    ]
