"""Command: one page about a finished run."""

from __future__ import annotations

from pathlib import Path

from tcaq_lightning.evaluation.latency import measure_latency
from tcaq_lightning.evaluation.layer_sensitivity import measure_sensitivity
from tcaq_lightning.reports.finished_run import read_finished
from tcaq_lightning.reports.html.write import write_page
from tcaq_lightning.runtime.command import at_least, check_writable, plain_console, progress_bar, set_threads
from tcaq_lightning.runtime.extensions import load_extensions


def report(
    run_dir: Path,
    output: Path | None = None,
    latency: list[int] | None = None,
    sensitivity: int = 0,
    threads: int | None = None,
    extensions: list[str] | None = None,
) -> None:
    """Write one self-contained HTML page about a finished run of train.py.

    What --latency and --sensitivity measure is kept in RUN_DIR/report and shown by later reports too.

    Args:
        run_dir: of a finished run.
        output: HTML file; without it, RUN_DIR/report.html.
        latency: batch sizes, such as [1,8], to measure a denoiser call's time and memory with, on every backend.
        sensitivity: held-out trajectories, such as 8, to measure the noise error of each layer quantized alone on; 0
            leaves it out. A measurement that was stopped goes on.
        threads: CPU threads; without it, PyTorch's choice.
        extensions: Python files or modules of your own that register parts, imported first; what a run
            imported is not imported unless it is given here.

    Example:
        python -m tcaq_lightning report runs/quickstart --sensitivity 8 --latency 1,8
    """
    for size in latency or []:
        at_least(1, 2**20, latency=size)
    at_least(0, 100_000, sensitivity=sensitivity)
    load_extensions(extensions or [])
    set_threads(threads)
    run = read_finished(run_dir)
    target = run_dir / "report.html" if output is None else output
    check_writable(target)
    if sensitivity:
        with progress_bar(1, "layers") as advance:
            measure_sensitivity(run_dir, run.manifest["config"], sensitivity, advance.to)
    if latency:
        measure_latency(run_dir, run.manifest["config"], latency, threads, extensions or [])
    write_page(run, target)
    plain_console().print(f"report: {target}", soft_wrap=True)
