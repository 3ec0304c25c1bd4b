"""Sections of the page about the result: figures, images, sizes, latency, sensitivity, errors, manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from tcaq_lightning.evaluation.layer_sensitivity import WHOLE
from tcaq_lightning.reports.figures import draw_bias, draw_relative_error, plot_mismatch
from tcaq_lightning.reports.finished_run import FinishedRun, Record
from tcaq_lightning.reports.headline import headline
from tcaq_lightning.reports.html import charts
from tcaq_lightning.reports.html.page import (
    Block,
    Cards,
    Code,
    Column,
    Figure,
    Gallery,
    Section,
    Table,
    Text,
    drawn,
    note,
    number,
    plot_style,
    png,
)

MOST_ROWS = 40
"""Rows of a chart; the table beside it has them all."""


def summary(run: FinishedRun) -> Section:
    """The figures that matter, and notes about files that could not be read."""
    rows = [(name, text) for name, text in headline(run.metrics) if not name.startswith("seconds: ")]
    seconds = sum(run.metrics["stages"].values())
    rows.append(("seconds in all stages", f"{seconds:.0f}"))
    blocks: list[Block] = [Cards(rows), *map(note, run.notes)]
    if sampler := run.metrics.get("sampler"):
        scheduler = sampler.get("scheduler") or "the model's own scheduler"
        options = "".join(f", {key} {value}" for key, value in (sampler.get("options") or {}).items())
        blocks.append(
            Text(
                f"Images by {scheduler}, {sampler['num_steps']} steps, eta {sampler['eta']:g}{options}; errors are "
                "against the full-precision model. The noise error is ||q - f||² / ||f||² of the two models' "
                "predictions on held-out full-precision trajectories; lower is better, and so for MSE and FID. MSE "
                "and PSNR are of samples clipped to [-1, 1]."
            )
        )
    return Section("summary", "Summary", blocks)


def images(run: FinishedRun) -> Section:
    """Pictures of both models from the same noise."""
    section = Section("images", "Images side by side")
    for path in sorted((run.directory / "samples").glob("*.png")):
        caption = (
            f"{path.name}: in each pair of rows the full-precision model above and the quantized one below, from the "
            "same noise; a column whose two pictures differ is a trajectory that went another way."
        )
        alt = "Grid of sampled images, full precision above, quantized below"
        try:
            section.blocks.append(png(path.read_bytes(), caption, alt, wide=True))
        except ValueError as error:
            section.blocks.append(note(f"{path} is damaged ({error}) and is left out here."))
    return or_nothing(section, "The run has written no pictures (RUN_DIR/samples).")


def coverage(run: FinishedRun) -> Section:
    """Bits of every layer."""
    rows = run.metrics["coverage"]
    section = Section("coverage", "Bits and coverage by layer")
    if not rows:
        return or_nothing(section, "The run recorded no coverage.")
    kinds = list(dict.fromkeys(row["bits"] for row in rows))
    parameters = {bits: sum(row["parameters"] for row in rows if row["bits"] == bits) for bits in kinds}
    kinds.sort(key=lambda bits: -parameters[bits])
    total = max(sum(parameters.values()), 1)
    counted = [
        (bits, sum(row["bits"] == bits for row in rows), parameters[bits], parameters[bits] / total) for bits in kinds
    ]
    columns = [Column("bits"), Column("rows", "integer"), Column("parameters", "integer"), Column("share", "percent")]
    section.blocks += [
        Text(
            "W, A and P are the bits of weights, activations and attention probabilities; “float” stays in full "
            "precision. Every layer with parameters and every attention matmul has a row; biases count as layers'."
        ),
        Table("By bits, most parameters first.", columns, counted),
    ]
    layers = [(r["name"], r["kind"], r["bits"], r["parameters"], r["note"] or None) for r in rows]
    columns = [Column("layer", "code"), Column("kind"), Column("bits"), Column("parameters", "integer"), Column("note")]
    section.blocks.append(Table(f"All {len(rows)} rows, in the model's order.", columns, layers, folded=True))
    return section


def sizes(run: FinishedRun) -> Section:
    """Bytes on disk."""
    section = Section("sizes", "Sizes")
    size = run.metrics.get("bytes")
    if not size:
        return or_nothing(section, "The run recorded no sizes.")
    parameters = sum(row["parameters"] for row in run.metrics["coverage"])
    rows = [
        (name, size[key], 8 * size[key] / parameters if parameters else None, size[key] / size["full"])
        for name, key in (("full precision", "full"), ("quantized", "quantized"))
    ]
    columns = [
        Column("denoiser"),
        Column("bytes on disk", "integer"),
        Column("bits per parameter", "times"),
        Column("of full precision", "times"),
    ]
    with plot_style():
        plot = charts.bars([r[0] for r in rows], [r[1] / 1e6 for r in rows], "megabytes on disk")
    caption = (
        "Bytes of the denoiser's files. The quantized one holds packed integer weights, their scales, the steps of "
        "every timestep group, TCR's factors, corrections of mean errors (float16), norms and biases."
    )
    alt = f"Full precision {size['full']:,} bytes, quantized {size['quantized']:,} bytes"
    section.blocks += [drawn(plot, caption, alt), Table("The same in figures.", columns, rows)]
    return section


def latency(measured: Record | None) -> Section:
    """Time and memory of one denoiser call."""
    section = Section("latency", "Latency and memory by backend")
    if measured is None:
        return or_nothing(section, "Not measured. Add --latency [1,8] to measure these batch sizes on this machine.")
    rows = [row for row in measured["rows"] if not row.get("problem")]
    baseline = {r["batch"]: r["seconds"] for r in rows if r["model"] == "full precision"}
    section.blocks.append(
        Text(
            f"One call of the denoiser on {measured['machine']}, {measured['threads']} threads; the median of the "
            "calls, with the fastest and slowest. Each model has a process of its own, and they take turns; memory is "
            "the peak of that process, and beside it what remains without the interpreter and libraries. The torch "
            "backend simulates integer arithmetic in float32: its gain is on disk, not in time."
        )
    )
    if rows:
        section.blocks += [_latency_charts(rows), _latency_table(rows, baseline)]
    problems = [row for row in measured["rows"] if row.get("problem")]
    section.blocks += [note(f"{_runner(row)}: not measured, {row['problem']}") for row in problems]
    return section


def _runner(row: Record) -> str:
    """Which model ran on what."""
    return f"{row['model']}, {row['backend']}"


def _latency_charts(rows: Sequence[Record]) -> Gallery:
    """Time and memory by batch size, side by side."""
    names = list(dict.fromkeys(map(_runner, rows)))
    batches = sorted({row["batch"] for row in rows})
    labels = [f"batch {batch}" for batch in batches]
    found = {(_runner(row), row["batch"]): row for row in rows}
    per_sample = {
        name: [_ratio(_thousandfold(found.get((name, batch), {}).get("seconds")), batch) for batch in batches]
        for name in names
    }
    memory = {name: [_millions(_above_idle(found.get((name, batch), {}))) for batch in batches] for name in names}
    with plot_style():
        plots = [
            (
                charts.grouped_bars(labels, per_sample, "milliseconds a sample"),
                "Median time of a call, by sample; lower is faster.",
            ),
            (
                charts.grouped_bars(labels, memory, "megabytes"),
                "Peak memory of the process beyond the interpreter and libraries; lower is smaller.",
            ),
        ]
    return Gallery([drawn(plot, caption, caption) for plot, caption in plots])


def _latency_table(rows: Sequence[Record], baseline: Mapping[int, float]) -> Table:
    """All that was measured, beside the full-precision model's time."""
    cells = [
        (
            row["model"],
            row["backend"],
            row["batch"],
            row["seconds"],
            row["fastest"],
            row["slowest"],
            _ratio(baseline.get(row["batch"]), row["seconds"]),
            row["peak"],
            _above_idle(row),
        )
        for row in rows
    ]
    columns = [
        Column("model"),
        Column("backend"),
        Column("batch", "integer"),
        Column("median ms", "milliseconds"),
        Column("fastest ms", "milliseconds"),
        Column("slowest ms", "milliseconds"),
        Column("speed over full precision", "times"),
        Column("peak MB", "megabytes"),
        Column("MB beyond libraries", "megabytes"),
    ]
    return Table("By model, backend and batch size.", columns, cells)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _above_idle(row: Record) -> float | None:
    return row["peak"] - row["idle"] if row.get("peak") is not None and row.get("idle") is not None else None


def _thousandfold(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def _millions(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def sensitivity(run: FinishedRun, measured: Record | None) -> Section:
    """Ranking of the layers by the noise error that each costs alone."""
    section = Section("sensitivity", "Sensitivity by layer")
    parts = dict(measured["parts"]) if measured else {}
    whole = parts.pop(WHOLE, None)
    if not parts:
        return or_nothing(section, "Not measured. Add --sensitivity 8 to measure it on 8 held-out trajectories.")
    ranked = sorted(parts.items(), key=lambda item: -(item[1]["summary"] or 0.0))
    total = sum(part["summary"] or 0.0 for part in parts.values())
    bits = {row["name"]: row["bits"] for row in run.metrics["coverage"]}
    bits |= {  # an attention has a row for each matmul
        name: ", ".join(row["bits"] for row in run.metrics["coverage"] if row["name"].startswith(f"{name} ("))
        for name, part in parts.items()
        if part["kind"] == "attention"
    }
    section.blocks.append(
        Text(
            "Noise error, mean over t > 0, of the full-precision model in which this one layer alone is quantized, "
            "with the artifact's integers and the quantizer of its input; of an attention, the operands of its two "
            "matmuls. The correction of mean errors, which belongs to a whole unit, is left out. Layers at the top "
            "gain most from more bits."
        )
    )
    if whole is None:
        section.blocks.append(
            note("The measurement is not complete: repeat --sensitivity with the same number, and it goes on.")
        )
    else:
        section.blocks.append(
            Cards(
                [
                    ("noise error, all quantized", number(whole["summary"])),
                    ("sum of all single errors", number(total)),
                    ("largest single error", number(ranked[0][1]["summary"])),
                ]
            )
        )
    top = ranked[:MOST_ROWS]
    with plot_style():
        plot = charts.ranking([name for name, _ in top], [p["summary"] for _, p in top], "noise error alone")
    caption = (
        f"The {len(top)} of {len(ranked)} layers and attentions that cost most by themselves; farther right is worse."
    )
    section.blocks.append(drawn(plot, caption, f"Ranking of layers; the first is {top[0][0]}", wide=True))
    rows = [
        (rank, name, p["kind"], bits.get(name), p["summary"], _ratio(p["summary"], total))
        for rank, (name, p) in enumerate(ranked, start=1)
    ]
    columns = [
        Column("rank", "integer"),
        Column("layer", "code"),
        Column("kind"),
        Column("bits"),
        Column("noise error alone", "number"),
        Column("share of the sum", "percent"),
    ]
    section.blocks.append(Table("The whole ranking.", columns, rows, folded=len(rows) > MOST_ROWS))
    return section


def noise_error(run: FinishedRun) -> Section:
    """Error of the noise by timestep."""
    section = Section("noise-error", "Noise error by timestep")
    noise = run.metrics.get("noise_error")
    if not noise or not noise["timesteps"]:
        return or_nothing(section, "The run measured no noise error.")
    from matplotlib.figure import Figure as Plot

    pictures = []
    for draw, caption in (
        (
            draw_relative_error,
            (
                "Relative error of the prediction, sampling runs from left to right. It usually grows toward t = 0, "
                "where the noise is ill-posed and hardly moves the image; the summary leaves t = 0 out."
            ),
        ),
        (
            draw_bias,
            "Mean error of the prediction. One that stays on a side of 0 makes whole images drift darker or lighter.",
        ),
    ):
        with plot_style():
            plot = Plot(figsize=(charts.WIDTH / 2, 2.7), layout="constrained")
            draw(plot.subplots(), noise)
        pictures.append(drawn(plot, caption, caption))
    columns = [Column("t", "number"), Column("relative error", "number"), Column("mean error", "number")]
    rows = list(zip(noise["timesteps"], noise["relative"], noise["bias"], strict=True))
    section.blocks += [Gallery(pictures), Table("The same in figures.", columns, rows, folded=True)]
    return section


def mismatch(run: FinishedRun) -> Section:
    """Distance of the two samplers by round."""
    section = Section("mismatch", "Mismatch by timestep and round")
    if not run.rounds:
        return or_nothing(section, "The run recorded no rounds.")
    with plot_style():
        plot = plot_mismatch(run.rounds)
    means = ", ".join(f"round {r['round']} {number(r['mean_mismatch'])}" for r in run.rounds)
    caption = (
        "Relative distance of the quantized sampler's x_t from the full-precision sampler's, from the same held-out "
        f"noise; lower is closer. Mean: {means}. PAR's later rounds are to lower it; one that does not is undone."
    )
    columns = [Column("t", "number"), *(Column(f"round {r['round']}", "number") for r in run.rounds)]
    by_step = zip(run.rounds[0]["timesteps"], *(r["mismatch"] for r in run.rounds), strict=True)
    outcome = [(r["round"], r["mean_mismatch"], "kept" if r["kept"] else "undone") for r in run.rounds]
    section.blocks += [
        drawn(plot, caption, f"Mismatch against the timestep; {means}"),
        Table("Rounds.", [Column("round", "integer"), Column("mean mismatch", "number"), Column("outcome")], outcome),
        Table("By timestep.", columns, list(by_step), folded=True),
    ]
    if len(run.rounds) == 1:
        section.blocks.append(Text("There is one round: PAR was off."))
    return section


def stages(run: FinishedRun) -> Section:
    """Seconds by stage."""
    section = Section("stages", "Seconds by stage")
    seconds = {name: value for name, value in run.metrics["stages"].items() if value is not None}
    if not seconds:
        return or_nothing(section, "The run recorded no times.")
    total = sum(seconds.values()) or 1.0
    order = sorted(seconds, key=lambda name: -seconds[name])
    with plot_style():
        plot = charts.bars(order, [seconds[name] for name in order], "seconds")
    caption = (
        f"Wall time of each stage over all units and rounds, {sum(seconds.values()):.0f} s together, longest first; "
        "parts that an interrupted run did before it was resumed are counted where their results were kept."
    )
    columns = [Column("stage"), Column("seconds", "seconds"), Column("share", "percent")]
    rows = [(name, seconds[name], seconds[name] / total) for name in order]
    alt = f"Bars of seconds by stage; the longest is {order[0]}"
    section.blocks += [drawn(plot, caption, alt), Table("The same in figures.", columns, rows, folded=True)]
    return section


def manifest(run: FinishedRun) -> Section:
    """Configuration, versions and plan."""
    content = run.manifest
    versions = content.get("versions") or {"tcaq-lightning": content.get("version")}
    plan = content.get("plan") or {}
    simple = [(key, value) for key, value in _flat(plan)]
    return Section(
        "manifest",
        "Manifest",
        [
            Table(
                f"Hashes of the inputs; they and the settings make the run {content.get('run', '')}.",
                [Column("input", "code"), Column("SHA-256, its beginning", "code")],
                list((content.get("inputs") or {}).items()),
                folded=True,
            ),
            Table(
                "Versions that the run was made with.", [Column("package"), Column("version")], list(versions.items())
            ),
            Table(
                "The plan that was stated before the run.",
                [Column("item", "code"), Column("value")],
                simple,
                folded=True,
            ),
            Code("The whole configuration (YAML)", yaml.safe_dump(content["config"], sort_keys=False)),
        ],
    )


def _flat(values: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested values as (dotted key, text)."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield (
            prefix,
            f"{values:,}" if isinstance(values, (int, float)) and not isinstance(values, bool) else str(values),
        )


def or_nothing(section: Section, reason: str) -> Section:
    """The section, or what it says where it has nothing to show."""
    if not section.blocks:
        section.blocks.append(note(reason))
    return section


def unfolded(figures: Sequence[Figure], title: str, most: int) -> list[Block]:
    """Figures to unfold, at most so many, and a note about the others.

    Args:
        figures: all of them.
        title: of what is unfolded.
        most: largest number of figures to show.
    """
    blocks: list[Block] = [Gallery(figures[:most], title)] if figures else []
    if len(figures) > most:
        blocks.append(note(f"{len(figures) - most} further figures of {title!r} are left out."))
    return blocks
