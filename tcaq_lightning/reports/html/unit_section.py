"""Section of the page about the units that were reconstructed: losses, gate, undecided and flipped weights."""

from __future__ import annotations

from collections.abc import Mapping

from tcaq_lightning.reports.finished_run import FinishedRun, Record
from tcaq_lightning.reports.html import charts
from tcaq_lightning.reports.html.calibration_sections import MOST_FIGURES, mean_known
from tcaq_lightning.reports.html.events import Curve, Events
from tcaq_lightning.reports.html.page import Block, Cards, Column, Figure, Section, Table, drawn, note, plot_style
from tcaq_lightning.reports.html.sections import or_nothing, unfolded

MOST_UNITS = 60
"""Rows of a chart of the units."""


def units(run: FinishedRun, events: Events) -> Section:
    """Losses, gate, and shares of undecided and flipped weights, by unit."""
    section = Section("units", "Losses by block")
    if not run.units:
        return or_nothing(section, "The run recorded no units.")
    learned = [unit for unit in run.units if unit.get("learned") is not None]
    if learned:
        section.blocks += _learned(run.units, learned)
    else:
        section.blocks.append(note("Nothing was learned: weights are rounded to nearest."))
    columns = [
        Column("round", "integer"),
        Column("unit", "code"),
        Column("error before", "number"),
        Column("learned", "number"),
        Column("error after", "number"),
        Column("undecided", "percent"),
        Column("flipped", "percent"),
        Column("gate"),
    ]
    rows = [
        (
            u["round"],
            u["unit"],
            u.get("before"),
            u.get("learned"),
            u.get("after"),
            u.get("undecided"),
            u.get("flipped"),
            "kept" if u["kept"] else "restored",
        )
        for u in run.units
    ]
    section.blocks.append(Table("All units and rounds, in execution order.", columns, rows, folded=True))
    curves = _curves(run, events)
    if curves:
        section.blocks += unfolded(curves, f"Loss curves of the {len(curves)} units", MOST_FIGURES)
    elif learned:
        section.blocks.append(note("There are no loss curves: the run logged nothing to TensorBoard."))
    return section


def _learned(units: list[Record], learned: list[Record]) -> list[Block]:
    names = list(dict.fromkeys(unit["unit"] for unit in units))
    rounds = sorted({unit["round"] for unit in learned})
    of = {(unit["round"], unit["unit"]): unit for unit in learned}

    def series(value: str) -> dict[str, list[float | None]]:
        found = {}
        for index in rounds:
            members = [of.get((index, name), {}) for name in names]
            found[f"round {index}"] = [_share(m) if value == "ratio" else m.get(value) for m in members]
        return found

    refused = [f"{u['unit']} (round {u['round']})" for u in units if not u["kept"]]
    cards = [
        ("learned states that the gate kept", f"{len(units) - len(refused)} of {len(units)}"),
        ("undecided weights, mean", _percent(mean_known([u.get("undecided") for u in learned]))),
        ("flipped roundings, mean", _percent(mean_known([u.get("flipped") for u in learned if u["round"] == 0]))),
    ]
    with plot_style():
        ratio = charts.dots(*_most(names, series("ratio")), "held-out error after learning, over that before", mark=1.0)
        undecided = charts.dots(*_most(names, _hundredfold(series("undecided"))), "undecided weights, %", mark=1.0)
        flipped = charts.dots(
            *_most(names, _hundredfold(series("flipped"))), "roundings other than before the round, %"
        )
    some = f" The {MOST_UNITS} units with the largest values; the table has all." if len(names) > MOST_UNITS else ""
    blocks: list[Block] = [Cards(cards)]
    if refused:
        blocks.append(note(f"The gate restored the state before learning for: {', '.join(refused)}."))
    blocks += [
        drawn(
            ratio,
            "Each unit's error on held-out calibration samples after the round's learning, over its error before it; "
            "units in execution order. Left of the line learning helped, right of it the gate restores the state."
            + some,
            "Ratio of held-out errors by unit",
            wide=True,
        ),
        drawn(
            undecided,
            "Weights whose rounding was still between up and down when it was hardened; above 1 % (the line) more "
            "iterations or a larger rounding_lr would help.",
            "Shares of undecided weights by unit",
            wide=True,
        ),
        drawn(
            flipped,
            "Weights that the round's learning rounds the other way than the state that it began with; in round 0 "
            "that is rounding to nearest.",
            "Shares of flipped roundings by unit",
            wide=True,
        ),
    ]
    return blocks


def _most(names: list[str], series: dict[str, list[float | None]]) -> tuple[list[str], dict[str, list[float | None]]]:
    """The units with the largest values, in execution order."""
    largest = [max((values[i] or 0.0 for values in series.values()), default=0.0) for i in range(len(names))]
    kept = sorted(sorted(range(len(names)), key=lambda i: -largest[i])[:MOST_UNITS])
    return [names[i] for i in kept], {name: [values[i] for i in kept] for name, values in series.items()}


def _share(unit: Record) -> float | None:
    before, learned = unit.get("before"), unit.get("learned")
    return learned / before if before and learned is not None else None


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _hundredfold(series: Mapping[str, list[float | None]]) -> dict[str, list[float | None]]:
    return {name: [None if v is None else 100 * v for v in values] for name, values in series.items()}


def _curves(run: FinishedRun, events: Events) -> list[Figure]:
    """One figure a unit: its reconstruction loss in every fit."""
    fits = events.under("reconstruction/")
    figures: list[Figure] = []
    for unit in run.units:
        if unit["round"] != 0 or len(figures) >= MOST_FIGURES:
            continue
        tag = f"{int(unit['position']):02d}-{unit['unit']}"
        own: dict[str, Curve] = {}
        for index in range(len(run.rounds) or 1):
            for phase in ("r", "v"):
                if curve := fits.get(f"round{index}/{tag}/{phase}"):
                    own[f"round {index}, {phase.upper() if phase == 'v' else phase}"] = curve
        if own:
            with plot_style():
                plot = charts.losses(own, unit["unit"])
            caption = (
                f"{unit['unit']}: reconstruction loss of the batches over the steps of each fit, r of TCR (with "
                "activation steps) and V of the rounding; batches differ, so the curves are rough."
            )
            figures.append(drawn(plot, caption, f"Loss curves of {unit['unit']}"))
    return figures
