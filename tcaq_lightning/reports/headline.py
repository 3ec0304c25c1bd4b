"""The figures that matter: what the console, report.md and report.html begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tcaq_lightning.evaluation.scores import row_of

if TYPE_CHECKING:
    from rich.table import Table

Record = Mapping[str, Any]
"""JSON-ready values by name."""


def headline(content: Record) -> list[tuple[str, str]]:
    """The figures that matter, as (name, text) rows; what was not measured is left out.

    >>> headline({"same_noise": {"mse": 0.0125, "psnr": 25.04, "num_images": 64}, "stages": {"learn": 61.2}})
    [('same-noise image MSE (64 images)', '0.0125'), ('same-noise image PSNR', '25.04 dB'), ('seconds: learn', '61.2')]
    """
    rows = []
    if noise := content.get("noise_error"):
        rows.append(("noise error, mean over t > 0", significant(noise["summary"])))
    if images := content.get("same_noise"):
        rows.append((f"same-noise image MSE ({images['num_images']} images)", significant(images["mse"])))
        # None stands for infinity: the images are equal.
        rows.append(("same-noise image PSNR", "-" if images["psnr"] is None else f"{images['psnr']:.2f} dB"))
    scores = content.get("scores") or {}
    for key, label in (("full", "full precision"), ("quantized", "quantized"), ("images", "images")):
        shown = [row_of(name, record) for name, record in scores.get(key, {}).items()]
        rows += [(f"{row.label}, {label}", row.text) for row in shown]
    if size := content.get("bytes"):
        text = f"{size['quantized']:,} of {size['full']:,} bytes ({size['full'] / size['quantized']:.2f} times smaller)"
        rows.append(("denoiser on disk", text))
    rows += [(f"seconds: {stage}", f"{value:.1f}") for stage, value in (content.get("stages") or {}).items()]
    return rows


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
