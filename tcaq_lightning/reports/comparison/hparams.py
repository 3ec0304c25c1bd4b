"""The comparison in TensorBoard's HParams."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tcaq_lightning.reports.comparison.rows import Compared


def write_hparams(compared: Sequence[Compared], directory: Path) -> None:
    """Write one run of HParams for each row, in place of those that are there.

    Args:
        compared: the rows.
        directory: of the event files, which is this function's own.
    """
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(directory, ignore_errors=True)
    for c in compared:
        name = f"{c.row.method}-{c.row.bits}"
        with SummaryWriter(str(directory / name)) as writer:
            settings = {"method": c.row.method, "bits": c.row.bits, **_plain(c.row.run.manifest["config"])}
            writer.add_hparams(settings, _figures(c), run_name=".")


def _figures(c: Compared) -> dict[str, float]:
    figures = {
        "noise_error": c.noise.value,
        "image_mse": c.images.value,
        "psnr": c.psnr,
        "bytes": c.size,
        "seconds": c.seconds,
        "peak_memory": c.peak_memory,
    }
    return {f"compare/{name}": value for name, value in figures.items() if value is not None}


def _plain(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings that HParams can show, by dotted key."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _plain(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            found[f"{prefix}{key}"] = value
    return found
