"""The table and plot of docs/benchmarks.md, from the JSON lines of the other scripts.

    python -m benchmarks.step --threads 1 >> results.jsonl
    python -m benchmarks.summary --results results.jsonl --plot benchmarks.png

Prints a Markdown table with one row a line, and draws the steps by unit, the memory, the depths, and the stages.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import auto_cli

from benchmarks.stages import LOOP
from tcaq_lightning.calibration.storage import GIGABYTE
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.exit_codes import run_cli

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = dict[str, Any]
"""What one benchmark printed."""

Row = tuple[str, str, str]
"""What was measured, the limit it is held against, and the figure."""

STEP_LIMIT = 1.35
"""Of a step against plain training's."""


def read_results(path: Path) -> list[Result]:
    """JSON lines; the last one of each benchmark, model and setting counts.

    Raises:
        UserError: the file cannot be read, or a line is not what a benchmark prints.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"--results must be a file of JSON lines, got {path}: {error.strerror}") from error
    results = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    return list({_label(result): result for result in results}.values())


def _parse(line: str, place: str) -> Result:
    """One line of the file, which `place` names."""
    with contextlib.suppress(json.JSONDecodeError):
        result = json.loads(line)
        if isinstance(result, dict) and result.get("benchmark") in ROWS:
            return result
    raise UserError(f"{place} must be the JSON line of a benchmark, got {line[:60]!r}")


def _label(result: Result) -> str:
    """Benchmark, model, threads and what else tells two results apart."""
    parts = [result["benchmark"], result.get("backend"), result.get("model")]
    parts += [f"{result['threads']} thread{'s' * (result['threads'] > 1)}"] if result.get("threads") else []
    parts += [f"products in {result['products']}"] if "products" in result else []
    parts += ["compiled"] if result.get("compiled") else []
    parts += [result["machine"]["instructions"]] if "instructions" in result.get("machine", {}) else []
    return ", ".join(str(part) for part in parts if part)


def _title(result: Result, more: str = "") -> str:
    """The label over a panel, in lines that fit."""
    return textwrap.fill(_label(result) + more, 40)


def _step(result: Result) -> Iterable[Row]:
    for phase, measured in result["phases"].items():
        yield f"a step of phase {phase} / plain training's", f"<= {STEP_LIMIT}", f"{measured['ratio']:.2f}"


def _executions(result: Result) -> Iterable[Row]:
    streams = [result["per_sample"][name] for name in ("full_stream", "quantized_stream")]
    least, most = min(s["least"] for s in streams), max(s["most"] for s in streams)
    yield "runs of a layer a sample and stream (least, most)", "1, 1", f"{least:g}, {most:g}"


def _memory(result: Result) -> Iterable[Row]:
    for run in result["runs"]:
        yield f"peak / (models + budget + workspace), {run['samples']} samples", "<= 1.10", f"{run['ratio']:.2f}"


def _depth(result: Result) -> Iterable[Row]:
    yield f"time at {result['blocks_ratio']:g} x the blocks, by work", "<= 1.10", f"{result['seconds_per_work']:.2f}"
    yield f"memory beside the models at {result['blocks_ratio']:g} x the blocks", "1", f"{result['memory_ratio']:.2f}"


def _stages(result: Result) -> Iterable[Row]:
    yield f"time outside the loop, {result['iterations']} iterations", "<= 15 %", f"{result['outside_share']:.1%}"


def _range_search(result: Result) -> Iterable[Row]:
    shape = " x ".join(str(size) for size in result["shape"])
    yield f"loop over channels / vectorised search, {shape}", "", f"{result['speed_up']:.0f}"


def _ranks(result: Result) -> Iterable[Row]:
    for part, efficiency in result["efficiency"].items():
        label = f"{result['devices']} ranks / {result['devices']} x one, {part}"
        yield label, ">= 0.85" if part == "loop" else "", f"{efficiency:.2f}"


def _concurrency(result: Result) -> Iterable[Row]:
    yield "calls at once with other bits than alone", f"0 of {result['calls']}", str(result["wrong"])


def _kills(result: Result) -> Iterable[Row]:
    runs = result["runs"]
    yield f"bit-identical artifacts after {result['kills']} SIGKILLs", f"{runs}/{runs}", f"{result['identical']}/{runs}"


def _cost(result: Result) -> Iterable[Row]:
    for run in result["checked"]:
        yield f"predicted / measured seconds of {Path(run['run_dir']).name}", "", f"{run['ratio']:.2f}"
    for model in result["predicted"]:
        gigabytes = ", ".join(f"{model[k]:.0f}" for k in ("models_gb", "workspace_gb", "store_gb_per_rank"))
        label = f"{model['model']}, {model['ranks']} devices: hours; GB of models, workspace, store of each"
        yield label, "", f"{model['hours']:.1f} h; {gigabytes} GB"


def _true_size(result: Result) -> Iterable[Row]:
    if "minutes" in result:
        yield "minutes of a whole run", f"<= {result['minutes_limit']:g}", f"{result['minutes']:.1f}"
        yield "GB at most, of all memory", "", f"{result['run']['peak_rss_gb']:.1f}"
        return
    last = result["units"][-1]["unit"]
    limit = f"<= {result['peak_rss_limit_gb']:g}"
    yield f"GB at most, of all memory: plan, coverage, units up to {last}", limit, f"{result['peak_rss_gb']:.1f}"
    yield "share of the parameters that the coverage accounts for", "100 %", f"{result['coverage']['covered']:.0%}"


ROWS: dict[str, Callable[[Result], Iterable[Row]]] = {
    "step": _step,
    "executions": _executions,
    "memory": _memory,
    "depth": _depth,
    "stages": _stages,
    "range_search": _range_search,
    "ranks": _ranks,
    "kills": _kills,
    "concurrency": _concurrency,
    "cost": _cost,
    "true_size": _true_size,
}
"""What of a benchmark goes into the table."""


def table(results: list[Result]) -> str:
    """Markdown."""
    heading = [("benchmark", "figure", "limit", "measured"), ("---",) * 4]
    rows = [(_label(result), *row) for result in results for row in ROWS[result["benchmark"]](result)]
    return "\n".join(f"| {' | '.join(row)} |" for row in heading + rows)


def _draw_step(axes: Axes, result: Result) -> None:
    for phase, measured in result["phases"].items():
        axes.plot(sorted(measured["units"].values()), marker=".", label=f"phase {phase}")
    axes.axhline(STEP_LIMIT, color="gray", linestyle=":")
    axes.set(title=_title(result), xlabel="units, sorted", ylabel="step / plain training's", yscale="log")
    axes.legend()


def _draw_memory(axes: Axes, result: Result) -> None:
    names = [str(run["samples"]) for run in result["runs"]]
    below = [0.0] * len(names)
    for part in ("models", "budget", "workspace"):
        heights = [run[part] / GIGABYTE for run in result["runs"]]
        axes.bar(names, heights, bottom=below, label=part)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.plot(names, [run["peak"] / GIGABYTE for run in result["runs"]], "k_", markersize=60, label="measured peak")
    axes.set(title=_title(result), xlabel="calibration samples", ylabel="GB", ylim=(0, 1.6 * max(below)))
    axes.legend(loc="upper center", ncols=2, markerscale=0.3)


def _draw_depth(axes: Axes, result: Result) -> None:
    runs = result["runs"]
    blocks = [run["blocks"] for run in runs]
    for key, label in (("calibration_seconds", "time"), ("flops", "operations of a pass")):
        axes.plot(blocks, [run[key] / runs[0][key] for run in runs], marker="o", label=label)
    beside = [run["peak"] - run["models"] for run in runs]
    axes.plot(blocks, [b / beside[0] for b in beside], marker="o", label="memory beside the models")
    axes.set(title=_title(result), xlabel="residual blocks", ylabel=f"against {blocks[0]} blocks")
    axes.legend()


def _draw_stages(axes: Axes, result: Result) -> None:
    shares = result["share"]
    names = sorted(shares, key=lambda name: float(shares[name]))
    colors = ["tab:blue" if name in LOOP else "tab:orange" for name in names]
    axes.barh(names, [100 * shares[name] for name in names], color=colors)
    axes.set(title=_title(result, f", {result['iterations']} iterations"), xlabel="% of the time (loop: blue)")


PANELS: dict[str, Callable[[Axes, Result], None]] = {
    "step": _draw_step,
    "memory": _draw_memory,
    "depth": _draw_depth,
    "stages": _draw_stages,
}
"""What is drawn."""


def draw(results: list[Result], path: Path) -> None:
    """Write the plot.

    Args:
        results: of any benchmarks; those without a panel are passed over.
        path: of a PNG, SVG or PDF.

    Raises:
        UserError: there is nothing to draw.
    """
    from matplotlib.figure import Figure

    drawn = [result for result in results if result["benchmark"] in PANELS]
    if not drawn:
        raise UserError(f"--plot needs a result of {', '.join(PANELS)}, got none")
    rows = math.ceil(len(drawn) / 2)
    figure = Figure(figsize=(10, 3.4 * rows), layout="constrained")
    for place, result in enumerate(drawn, 1):
        axes = figure.add_subplot(rows, 2, place)
        PANELS[result["benchmark"]](axes, result)
        axes.title.set_fontsize("medium")  # labels are long
    figure.savefig(path, dpi=80)


def summary(results: Path, plot: Path | None = None) -> None:
    """Print the table, and draw the plot.

    Args:
        results: file of JSON lines.
        plot: picture to write.
    """
    found = read_results(results)
    print(table(found))
    if plot is not None:
        draw(found, plot)


if __name__ == "__main__":
    sys.exit(run_cli(lambda: auto_cli(summary, as_positional=False)))
