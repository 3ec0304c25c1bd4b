"""The table of denoisers in docs/models.md: `python -m benchmarks.denoisers`, some by their names behind it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

from benchmarks.denoisers.catalogue import denoiser_classes
from benchmarks.denoisers.measure import EXAMPLES, Measured, measure_example

HEADER = "| denoiser | layers | attention | weights | units | reload | export |\n|---|---|---|---|---|---|---|"


def row(name: str, measured: Measured | None) -> str:
    """One line of the table; None stands for a class without an example."""
    if measured is None:
        return f"| `{name}` | not measured | | | | | |"
    if "quantize" in measured.failures:
        return f"| `{name}` | {measured.failures['quantize']} | | | | | |"
    (layers, replaced), (calls, kept), (numel, covered) = measured.layers, measured.attentions, measured.weights
    cells = [
        f"{replaced} of {layers}",
        f"{calls - kept} of {calls}",
        f"{100 * covered / numel:.0f} %",
        str(measured.units),
        "bit-equal" if measured.reload else "no",
        measured.export or "refused",
    ]
    return f"| `{name}` | {' | '.join(cells)} |"


def table(names: Sequence[str]) -> str:
    """The table of denoiser classes whose names hold one of some texts; of all without any."""
    chosen = [n for n in denoiser_classes() if not names or any(name in n for name in names)]
    rows = [row(n, measure_example(n) if n in EXAMPLES else None) for n in chosen]
    return "\n".join([HEADER, *rows])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    print(table(sys.argv[1:]))
