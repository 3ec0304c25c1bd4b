"""The figures that matter: what the console, report.md and report.html begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tcaq_lightning.evaluation.scores import row_of

if TYPE_CHECKING:
    from rich.table import Table

Record = Mapping[str, Any]
"""JSON-ready values by name."""


def headline(content: Record) -> list[tuple[str, str]]:
    """The figures that matter, as (name, text) rows; what was not measured is left out.

    >>> headline({"noise_error": {"summary": 0.00188}, "stages": {"learn": 61.2}})
    [('noise error, mean over t > 0', '0.00188'), ('seconds: learn', '61.2')]
    """
    rows = []
    if noise := content.get("noise_error"):
        rows.append(("noise error, mean over t > 0", significant(noise["summary"])))
    if images := content.get("same_noise"):
        rows += _images(images)
    scores = content.get("scores") or {}
    for key, label in (("full", "full precision"), ("quantized", "quantized"), ("images", "images")):
        shown = [row_of(name, record) for name, record in scores.get(key, {}).items()]
        rows += [(f"{row.label}, {label}", row.text) for row in shown]
    if size := content.get("bytes"):
        text = f"{size['quantized']:,} of {size['full']:,} bytes ({size['full'] / size['quantized']:.2f} times smaller)"
        rows.append(("denoiser on disk", text))
    rows += _undone(content.get("rounds") or [], content.get("units") or [])
    rows += [(f"seconds: {stage}", f"{value:.1f}") for stage, value in (content.get("stages") or {}).items()]
    return rows


def _images(images: Record) -> list[tuple[str, str]]:
    """Errors of the same-noise images; earlier versions wrote the MSE of unclipped samples alone."""
    count = f"{images['num_images']} images"
    if "mse_unclipped" not in images:
        return [
            (f"same-noise image MSE, unclipped ({count})", significant(images["mse"])),
            ("same-noise image PSNR", _decibels(images["psnr"])),
        ]
    mse = [significant(images[key]) for key in ("mse", "mse_median", "mse_worst")]
    psnr = [_decibels(images[key]) for key in ("psnr", "psnr_median", "psnr_worst")]
    return [
        (f"same-noise image MSE, clipped ({count})", "{}, median {}, worst {}".format(*mse)),
        ("same-noise image PSNR", "{}, median {}, worst {}".format(*psnr)),
    ]


def _undone(rounds: Sequence[Record], units: Sequence[Record]) -> list[tuple[str, str]]:
    """Rounds that were undone, with what was spent on them, and how many units the gate left as they were."""
    rows = []
    spent = sum(record.get("iterations") or 0 for record in rounds)
    for record in rounds:
        if not record["kept"]:
            share = (
                f"; {(record.get('iterations') or 0) / spent:.0%} of the iterations were spent on it" if spent else ""
            )
            rows.append((f"round {record['round'] + 1}", f"undone, the mismatch did not fall{share}"))
    if left := sum(not unit["kept"] for unit in units):
        rows.append(("units that learning did not help", f"{left} of {len(units)}, left as they were"))
    return rows


def _decibels(value: float | None) -> str:
    """None stands for infinity, the images are equal, or for NaN."""
    return "-" if value is None else f"{value:.2f} dB"


def final_table(content: Record) -> Table:
    """The figures that matter as a table for the console."""
    from rich.table import Table

    table = Table("", "", title="Images" if "images" in content else "Quantized denoiser", show_header=False)
    for name, text in headline(content):
        table.add_row(name, text)
    return table


def significant(value: float | None) -> str:
    """Four significant digits, or a dash for what is not finite.

    >>> significant(0.0123456), significant(None)
    ('0.01235', '-')
    """
    return "-" if value is None else f"{value:.4g}"
