"""Command: methods side by side on one model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcaq_lightning.api import check_finished, open_model
from tcaq_lightning.calibration.run_dir import Run
from tcaq_lightning.cli.jobs import run_jobs
from tcaq_lightning.cli.train import config_file
from tcaq_lightning.config import Config
from tcaq_lightning.config.values import build, merged
from tcaq_lightning.errors import UserError
from tcaq_lightning.reports.comparison.hparams import write_hparams
from tcaq_lightning.reports.comparison.rows import Row, compare_rows
from tcaq_lightning.reports.comparison.tables import console_table
from tcaq_lightning.reports.comparison.write import write_comparison
from tcaq_lightning.reports.finished_run import read_finished
from tcaq_lightning.runtime.command import at_least, plain_console
from tcaq_lightning.runtime.lightning import quiet_lightning

RECIPES = Path("configs/recipes")
WIDTHS = Path("configs")


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        method: name of the recipe, or of the directory of a finished run.
        bits: such as `w4a4`.
        run_dir: of the run.
        config: of a run that is to be made; None of one that was named.
    """

    method: str
    bits: str
    run_dir: Path
    config: Config | None


def compare(
    recipes: list[str],
    model: str = "fashion-mnist-ddpm",
    bits: list[str] | None = None,
    output: Path = Path("runs/comparison"),
    settings: Path | None = None,
    devices: int = 1,
) -> None:
    """Run methods side by side on one model at equal bits, data and iterations, and write a table of them.

    Trajectories, full-precision images and statistics are made once. The same command again goes on where the last one
    stopped, and adds rows for further recipes.

    Args:
        recipes: names of configs/recipes, YAML files, or directories of finished runs; the others are held against the
            first one.
        model: a directory in diffusers layout, a hub id, or the name of a shipped model.
        bits: widths, such as w8a8,w4a4; without it, w4a4.
        output: directory of the runs, comparison.md, comparison.json, comparison.html, and TensorBoard's HParams.
        settings: YAML file of keys that hold for all rows, such as calibration.num_trajectories or trainer.threads.
        devices: runs at a time, each on a device of its own.

    Example:
        python -m tcaq_lightning compare nearest brecq ours --bits w8a8,w4a4 --output runs/comparison
    """
    at_least(1, 1024, devices=devices)
    quiet_lightning()
    shared = {} if settings is None else config_file(settings, f"--settings {settings}")
    cells = _by_width([cell for name in recipes for cell in _cells(name, model, bits or ["w4a4"], output, shared)])
    console = plain_console()
    waiting = [cell.config for cell in cells if cell.config is not None and not _is_finished(cell.config)]
    for config in waiting:
        open_model(config)  # whatever is wrong with any of them shows before the first one is run
    run_jobs(waiting, devices, lambda line: console.print(line, soft_wrap=True))
    compared = compare_rows([Row(cell.method, cell.bits, read_finished(cell.run_dir)) for cell in cells])
    write_comparison(compared, model, output)
    write_hparams(compared, output / "tensorboard")
    console.print(console_table(compared))
    console.print(f"comparison: {output / 'comparison.html'}", soft_wrap=True)


def _cells(name: str, model: str, bits: Sequence[str], output: Path, shared: dict[str, Any]) -> Iterator[Cell]:
    """The rows of a recipe, one for each width, or the one of a finished run."""
    given = Path(name)
    if (given / "manifest.json").is_file():
        quantization = read_finished(given).manifest["config"]["quantization"]
        width = f"w{quantization['weight']['bits']}a{quantization['activation']['bits']}"
        yield Cell(given.resolve().name, width, given, None)
        return
    recipe = config_file(_recipe(name), f"recipe {name}")
    for width in bits:
        run_dir = output / "runs" / f"{given.stem}-{width}"
        own = {"model": {"path": model}, "run_dir": run_dir, "cache_dir": output / "shared"}
        yield Cell(given.stem, width, run_dir, build(Config, merged(_width(width), recipe, shared, own)))


def _recipe(name: str) -> Path:
    """The file of a recipe, given by path or name."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = {path.stem: path for root in _roots() for path in sorted((root / RECIPES).glob("*.yaml"))}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f", such as {near[0]}" if near else ""
        raise UserError(
            f"recipes: expected a name of {RECIPES} ({', '.join(known)}), a YAML file or the directory of a finished "
            f"run{hint}, got {name!r}"
        )
    return known[name]


def _width(name: str) -> dict[str, Any]:
    """Settings of a width: those of its config, or its bits alone where there is none."""
    found = re.fullmatch(r"w([2-8])a([2-8])", name)
    if found is None:
        raise UserError(f"--bits: expected widths such as w4a8, each 2..8, got {name!r}")
    weight, activation = map(int, found.groups())
    for root in _roots():
        path = root / WIDTHS / f"{name}.yaml"
        if path.is_file():
            return config_file(path, str(path))
    return {"quantization": {"weight": {"bits": weight}, "activation": {"bits": activation}}}


def _roots() -> tuple[Path, ...]:
    """Where configs are looked for: here, and beside the package."""
    return Path(), Path(__file__).parents[2]


def _is_finished(config: Config) -> bool:
    with Run(config) as run:
        if run.finished:
            check_finished(config, run)
        return run.finished


def _by_width(cells: Sequence[Cell]) -> list[Cell]:
    """The rows of each width below each other, in the order of the recipes."""
    widths = list(dict.fromkeys(cell.bits for cell in cells))
    seen: set[tuple[str, str]] = set()
    for cell in cells:
        if (key := (cell.method, cell.bits)) in seen:
            raise UserError(f"recipes: {cell.method} at {cell.bits} is given twice; give each recipe a name of its own")
        seen.add(key)
    return sorted(cells, key=lambda cell: widths.index(cell.bits))
