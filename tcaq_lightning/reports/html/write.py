"""Write report.html."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tcaq_lightning.evaluation.latency import measured_latency
from tcaq_lightning.evaluation.layer_sensitivity import measured_sensitivity
from tcaq_lightning.reports.finished_run import FinishedRun
from tcaq_lightning.reports.html import calibration_sections, sections, unit_section
from tcaq_lightning.reports.html.events import read_events
from tcaq_lightning.reports.html.page import Section, render
from tcaq_lightning.runtime.files import write_bytes


def write_page(run: FinishedRun, output: Path) -> None:
    """Write the page of a finished run, with what was measured for it before.

    Args:
        run: as `read_finished` gives it.
        output: the HTML file, written whole or not at all.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # glyphs that a font lacks
    title = f"Quantization report: {run.directory.resolve().name}"
    model = run.manifest["config"]["model"]["path"]
    quantization = run.manifest["config"]["quantization"]
    bits = f"W{quantization['weight']['bits']}A{quantization['activation']['bits']}"
    subtitle = f"{model} at {bits}, tcaq-lightning {run.manifest.get('version')}"
    write_bytes(output, render(title, subtitle, page_sections(run)).encode())


def page_sections(run: FinishedRun) -> Sequence[Section]:
    """All sections of the page, in its order; one that has nothing to show says so."""
    events = read_events(run.directory / "tensorboard")
    return [
        sections.summary(run),
        sections.images(run),
        sections.coverage(run),
        sections.sizes(run),
        sections.latency(measured_latency(run.directory)),
        sections.sensitivity(run, measured_sensitivity(run.directory)),
        sections.noise_error(run),
        sections.mismatch(run),
        calibration_sections.tcr(run, events),
        calibration_sections.daq(run, events),
        unit_section.units(run, events),
        sections.stages(run),
        sections.manifest(run),
    ]
