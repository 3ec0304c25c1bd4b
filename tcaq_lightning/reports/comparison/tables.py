"""The comparison as a table: on the console, in Markdown, and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tcaq_lightning.reports.comparison.rows import Compared, Error
from tcaq_lightning.reports.headline import significant

if TYPE_CHECKING:
    from rich.table import Table

FIRST = "first row"
"""Stands where a row would be held against itself."""
CAPTION = (
    "ratio to the first row of the same bits, paired by trajectory or image. Better: yes or no where the ratio's 95 % "
    "interval leaves 1 out."
)
LEGEND = f"Errors with 95 % bootstrap intervals over trajectories and images. Ratio: {CAPTION}"


def header(compared: Sequence[Compared]) -> list[str]:
    """Titles of the columns."""
    scores = dict.fromkeys(label for c in compared for label in c.scores)
    return [
        *("method", "bits", "noise error", "ratio", "better", "image MSE", "ratio", "better", "PSNR"),
        *scores,
        *("MB", "seconds", "peak MB"),
    ]


def cells(compared: Sequence[Compared]) -> list[list[str]]:
    """One row of texts for each method and bits, in the columns of `header`."""
    scores = dict.fromkeys(label for c in compared for label in c.scores)
    return [
        [
            c.row.method,
            c.row.bits.upper(),
            *_error(c.noise),
            *_error(c.images),
            "-" if c.psnr is None else f"{c.psnr:.2f} dB",
            *(c.scores.get(label, "-") for label in scores),
            f"{c.size / 1e6:.3f}",
            f"{c.seconds:.0f}",
            "-" if c.peak_memory is None else f"{c.peak_memory / 1e6:.0f}",
        ]
        for c in compared
    ]


def differences(compared: Sequence[Compared]) -> list[list[str]]:
    """(method, bits, keys with values) of the rows whose settings differ from those of the first row."""
    return [
        [c.row.method, c.row.bits.upper(), ", ".join(f"{key}: {_short(value)}" for key, value in c.differing.items())]
        for c in compared
        if c.differing
    ]


def console_table(compared: Sequence[Compared]) -> Table:
    """The comparison for the console: the files have intervals, bytes and memory, too."""
    from rich.table import Table

    table = Table(title="Comparison", caption=f"x: {CAPTION}")
    for title in ("method", "bits", "noise error", "x", "better", "image MSE", "x", "better", "PSNR", "s"):
        table.add_column(title, overflow="fold")
    for c in compared:
        short = [cell for error in (c.noise, c.images) for cell in _short_error(error)]
        psnr = "-" if c.psnr is None else f"{c.psnr:.1f}"
        table.add_row(c.row.method, c.row.bits.upper(), *short, psnr, f"{c.seconds:.0f}")
    return table


def _short_error(error: Error) -> tuple[str, str, str]:
    value, first = "-" if error.value is None else f"{error.value:.2g}", error.to_first
    return (value, "", "") if first is None else (value, f"{first.ratio:.2f}", first.better)


def _error(error: Error) -> tuple[str, str, str]:
    value = significant(error.value)
    if error.interval is not None:
        value += " [{}, {}]".format(*map(significant, error.interval))
    first = error.to_first
    if first is None:
        return value, "-", FIRST if error.interval is not None else "-"
    return value, f"{first.ratio:.3f} [{first.low:.3f}, {first.high:.3f}]", first.better


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
