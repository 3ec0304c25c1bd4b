"""Pictures of a comparison: images from the same noise, and curves of the noise error."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from tcaq_lightning.evaluation.grid import LABELS, save_rows
from tcaq_lightning.reports.comparison.rows import Compared
from tcaq_lightning.reports.figures import points
from tcaq_lightning.runtime.files import DamagedFileError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def save_pictures(compared: Sequence[Compared], path: Path) -> bool:
    """Write images of the same noises as PNG: full precision first, then a row for each method and bits.

    Args:
        compared: of one model.
        path: the PNG file.

    Returns:
        Whether there were pictures: a run keeps some of them in RUN_DIR/samples.
    """
    rows: dict[str, Tensor] = {}
    for c in compared:
        try:
            tensors, _ = c.row.run.files.images.load()
        except (DamagedFileError, FileNotFoundError):
            continue
        full, quantized = (tensors[key].float() / 255 for key in ("full", "quantized"))
        rows.setdefault(LABELS[0], full)
        rows[f"{c.row.method} {c.row.bits.upper()}"] = quantized
    fewest = min(map(len, rows.values()), default=0)
    if fewest:
        save_rows({label: images[:fewest] for label, images in rows.items()}, path)
    return bool(fewest)


def plot_noise_errors(compared: Sequence[Compared]) -> Figure:
    """Relative noise error against the timestep: a plot for each width, a line for each method."""
    from matplotlib.figure import Figure

    widths = list(dict.fromkeys(c.row.bits for c in compared))
    width = 4.6 * len(widths) + 0.8
    figure = Figure(figsize=(width, 3.4))
    figure.subplots_adjust(left=0.75 / width, right=1 - 0.1 / width, bottom=0.14, top=0.91, wspace=0.3)
    for axes, bits in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        members = [c for c in compared if c.row.bits == bits]
        for c, marker in zip(members, cycle(MARKERS)):
            noise = c.row.noise
            values = [v or float("nan") for v in points(noise["relative"])]  # 0 has no place on a logarithmic axis
            axes.plot(noise["timesteps"], values, marker=marker, markersize=3, label=c.row.method.replace("$", r"\$"))
        axes.set(xlabel="t", ylabel="relative noise error", yscale="log", title=bits.upper())
        axes.invert_xaxis()
        axes.legend(fontsize=8)
    return figure
