"""Write a comparison: comparison.md, comparison.json, comparison.html and their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tcaq_lightning.evaluation.json_values import finite
from tcaq_lightning.reports.comparison.pictures import plot_noise_errors, save_pictures
from tcaq_lightning.reports.comparison.rows import Compared
from tcaq_lightning.reports.comparison.tables import LEGEND, cells, differences, header
from tcaq_lightning.reports.html.page import Block, Column, Section, Table, Text, drawn, note, plot_style, png, render
from tcaq_lightning.reports.markdown import markdown_table
from tcaq_lightning.runtime.files import replacing, write_bytes, write_json
from tcaq_lightning.runtime.version import VERSION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID = "grid.png"
CURVES = "noise_error.png"
TITLE = "Comparison of quantization methods"
ABOUT_GRID = "Images from the same noise: full precision first, then a row for each method and width."
ABOUT_CURVES = "Relative error of the predicted noise by timestep, on held-out full-precision trajectories."
ABOUT_DIFFERENCES = "Settings in which a row differs from the first one of its bits."


def write_comparison(compared: Sequence[Compared], model: str, directory: Path, problems: Sequence[str] = ()) -> None:
    """Write comparison.json, comparison.md, comparison.html, grid.png and noise_error.png.

    Args:
        compared: rows of the table.
        model: its path or name.
        directory: where to.
        problems: one line for each row that could not be measured.
    """
    content = {"model": model, "version": VERSION, "rows": [c.to_dict() for c in compared], "problems": list(problems)}
    write_json(directory / "comparison.json", finite(content))
    pictures = save_pictures(compared, directory / GRID)
    with replacing(directory / CURVES) as temporary:
        plot_noise_errors(compared).savefig(temporary, format="png", dpi=120)
    write_bytes(directory / "comparison.md", _markdown(compared, model, pictures, problems).encode())
    grid = directory / GRID if pictures else None
    write_bytes(directory / "comparison.html", _page(compared, model, grid, problems).encode())


def _markdown(compared: Sequence[Compared], model: str, pictures: bool, problems: Sequence[str]) -> str:
    parts = [f"# {TITLE}", f"Model: {model}.", markdown_table(header(compared), cells(compared)), LEGEND, *problems]
    if pictures:
        parts += ["## Images", ABOUT_GRID, f"![images]({GRID})"]
    parts += ["## Noise error by timestep", ABOUT_CURVES, f"![noise error]({CURVES})"]
    if rows := differences(compared):
        parts += ["## Settings", ABOUT_DIFFERENCES, markdown_table(["method", "bits", "settings"], rows)]
    return "\n\n".join(parts) + "\n"


def _page(compared: Sequence[Compared], model: str, grid: Path | None, problems: Sequence[str]) -> str:
    columns = [Column(title) for title in header(compared)]
    summary: list[Block] = [Table("All rows.", columns, cells(compared)), Text(LEGEND), *map(note, problems)]
    sections = [Section("summary", "Summary", summary)]
    if grid is not None:
        sections.append(Section("images", "Images", [png(grid.read_bytes(), ABOUT_GRID, ABOUT_GRID, wide=True)]))
    with plot_style():
        plot: Figure = plot_noise_errors(compared)
    sections.append(Section("noise", "Noise error by timestep", [drawn(plot, ABOUT_CURVES, ABOUT_CURVES, wide=True)]))
    if rows := differences(compared):
        titles = [Column("method"), Column("bits"), Column("settings", "code")]
        sections.append(Section("settings", "Settings", [Table(ABOUT_DIFFERENCES, titles, rows)]))
    return render(TITLE, f"{model}, tcaq-lightning {VERSION}", sections)
