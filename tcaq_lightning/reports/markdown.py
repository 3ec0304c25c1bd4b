"""Write metrics.json, and report.md with its plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcaq_lightning.evaluation.json_values import finite
from tcaq_lightning.nn.coverage import CoverageRow
from tcaq_lightning.reports.figures import plot_mismatch, plot_noise_error
from tcaq_lightning.reports.headline import Record, headline, significant
from tcaq_lightning.runtime.files import replacing, write_bytes, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE_PLOT = Path("plots/noise_error.png")
MISMATCH_PLOT = Path("plots/mismatch.png")


def write_report(
    run_dir: Path,
    metrics: Record,
    coverage: Sequence[CoverageRow],
    seconds: Mapping[str, float],
    units: Sequence[Record],
    rounds: Sequence[Record] = (),
) -> dict[str, Any]:
    """Write RUN_DIR/metrics.json, RUN_DIR/report.md and RUN_DIR/plots.

    Args:
        run_dir: pictures in its `samples` are embedded in the report.
        metrics: `Evaluation.to_dict()`, and under `bytes` the sizes on disk of the `full` and `quantized` denoiser.
        coverage: rows of the coverage table.
        seconds: by stage of the run.
        units: one record for each unit and round: `round`, `unit`, `before`, `after`, `kept`, and where they apply
            `learned`, `undecided`, `flipped`, `executions` by stage with the number of `samples`, and `attention`, by
            softmax quantizer `AttentionChoice.to_dict()`.
        rounds: one record for each round: `round`, `timesteps`, `mismatch`, `mean_mismatch`, `kept`.

    Returns:
        What metrics.json holds, for `final_table`.
    """
    content: dict[str, Any] = {
        **metrics,
        "stages": dict(seconds),
        "rounds": [dict(r) for r in rounds],
        "units": [dict(u) for u in units],
        "coverage": [dataclasses.asdict(row) for row in coverage],
    }
    content = finite(content)
    if metrics.get("noise_error"):
        _save(plot_noise_error(content["noise_error"]), run_dir / NOISE_PLOT)
    if rounds:
        _save(plot_mismatch(content["rounds"]), run_dir / MISMATCH_PLOT)
    samples = [p.relative_to(run_dir) for p in sorted((run_dir / "samples").glob("*.png"))]
    write_json(run_dir / "metrics.json", content)
    write_bytes(run_dir / "report.md", render(content, samples).encode())
    return content


def render(content: Record, samples: Sequence[Path] = ()) -> str:
    """The text of report.md.

    Args:
        content: as in metrics.json.
        samples: pictures, relative to the report.
    """
    parts = ["# Quantization report", markdown_table(["", ""], headline(content))]
    if samples:
        parts += ["## Samples", "Full precision above, quantized below, from the same noise."]
        parts += [f"![{path.stem}]({path.as_posix()})" for path in samples]
    if noise := content.get("noise_error"):
        parts += ["## Noise error by timestep", f"![noise error]({NOISE_PLOT.as_posix()})"]
        columns = zip(noise["timesteps"], noise["relative"], noise["bias"], strict=True)
        rows = [(f"{t:g}", significant(error), significant(bias)) for t, error, bias in columns]
        parts.append(markdown_table(["t", "relative error", "mean error"], rows))
    if rounds := content.get("rounds"):
        parts += _rounds(rounds)
    units = content.get("units") or []
    if units:
        parts += _units(units)
    if any(u.get("executions") for u in units):
        parts += _executions(units)
    attention = [(u["unit"], name, a) for u in units for name, a in (u.get("attention") or {}).items()]
    if attention:
        parts += _attention(attention)
    if coverage := content.get("coverage"):
        layers = [(r["name"], r["kind"], r["bits"], r["note"], f"{r['parameters']:,}") for r in coverage]
        parts += ["## Coverage", "Every layer with parameters and every attention matmul."]
        parts.append(markdown_table(["layer", "kind", "bits", "note", "parameters"], layers))
    return "\n\n".join(parts) + "\n"


def _rounds(rounds: Sequence[Record]) -> list[str]:
    """Mismatch of the quantized sampler's trajectories, one column for each round."""
    text = "Relative distance of the quantized sampler's x_t from the full-precision sampler's, on held-out noise."
    header = ["t", *(f"round {r['round']}" for r in rounds)]
    by_step = zip(rounds[0]["timesteps"], *(r["mismatch"] for r in rounds), strict=True)
    rows = [(f"{t:g}", *map(significant, values)) for t, *values in by_step]
    rows.append(("mean", *(significant(r["mean_mismatch"]) for r in rounds)))
    rows.append(("kept", *("yes" if r["kept"] else "no: the state before it" for r in rounds)))
    return ["## Mismatch by round", text, f"![mismatch]({MISMATCH_PLOT.as_posix()})", markdown_table(header, rows)]


def _units(units: Sequence[Record]) -> list[str]:
    """Held-out errors of the units and what the gate made of them."""
    refused = [u for u in units if not u["kept"]]
    gate = f"The gate kept {len(units) - len(refused)} of {len(units)} learned states."
    if refused:
        names = ", ".join(f"{u['unit']} (round {u['round']})" for u in refused)
        gate += f" The state before learning was restored for: {names}."
    rows = [
        (
            str(u["round"]),
            u["unit"],
            significant(u["before"]),
            significant(u.get("learned")),
            significant(u["after"]),
            _percent(u.get("undecided")),
            _percent(u.get("flipped")),
            "kept" if u["kept"] else "restored",
        )
        for u in units
    ]
    header = ["round", "unit", "error before", "learned", "error after", "undecided", "flipped", "gate"]
    text = "Errors of a unit's output on held-out calibration samples; shares of weights in per cent."
    return ["## Units", text, gate, markdown_table(header, rows)]


def _executions(units: Sequence[Record]) -> list[str]:
    """How often a unit ran on each calibration sample, by round and stage."""
    counted = [u for u in units if u.get("executions")]
    stages = list(dict.fromkeys(stage for u in counted for stage in u["executions"]))
    rows = []
    for number in sorted({u["round"] for u in counted}):
        members = [u for u in counted if u["round"] == number]
        samples = sum(u["samples"] for u in members)
        runs = (sum(u["executions"].get(stage, 0) for u in members) / samples for stage in stages)
        rows.append((str(number), *(f"{n:.3f}" for n in runs)))
    text = (
        "How often a unit ran on a calibration sample, mean over the units: once in each stream, whatever the depth "
        "(the last unit's outputs feed no other, and are not stored), and in the stages of its own calibration."
    )
    return ["## Executions", text, markdown_table(["round", *stages], rows)]


def _attention(attention: Sequence[tuple[str, str, Record]]) -> list[str]:
    """DAQ's choices, one row for each attention."""
    rows = []
    for unit, name, a in attention:
        groups = len(a["logarithmic"])
        agreed = sum(x == y for x, y in zip(a["by_likelihood"], a["by_error"], strict=True))
        errors = [_mean(a[key]) for key in ("uniform_error", "log_error")]
        pattern = "".join("L" if chosen else "u" for chosen in a["logarithmic"])
        counts = [f"{count} of {groups}" for count in (sum(a["logarithmic"]), agreed)]
        rows.append((unit, name, f"`{pattern}`", *counts, *map(significant, errors)))
    header = ["unit", "softmax quantizer", "groups", "logarithmic", "rules agree", "uniform error", "log error"]
    text = (
        "One letter for each timestep group, small t first: L logarithmic, u uniform. "
        "Errors are relative, of the attention's output, averaged over the groups."
    )
    return ["## DAQ", text, markdown_table(header, rows)]


def _mean(values: Sequence[float | None]) -> float | None:
    """None if any value is not finite."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
