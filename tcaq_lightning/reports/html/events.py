"""What only TensorBoard's event files hold: losses step by step, and figures of runs that kept no statistics."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

Curve = tuple[list[int], list[float]]
"""Steps, and the values at them."""


@dataclass(frozen=True)
class Events:
    """Scalars and pictures by tag.

    Attributes:
        curves: scalars over steps.
        pictures: PNG files of the last step.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def under(self, prefix: str) -> dict[str, Curve]:
        """Curves whose tag begins with `prefix`, by the rest of it."""
        return {tag.removeprefix(prefix): curve for tag, curve in self.curves.items() if tag.startswith(prefix)}

    def pictures_under(self, prefix: str) -> dict[str, bytes]:
        """Pictures whose tag begins with `prefix`, by the rest of it."""
        return {tag.removeprefix(prefix): png for tag, png in self.pictures.items() if tag.startswith(prefix)}


def read_events(directory: Path) -> Events:
    """Read the event files of a run; nothing for a run that logged none.

    A file that ends in the middle of an event, as after SIGKILL, is read up to there. Where a resumed run repeats a
    step, the later value counts.

    Args:
        directory: RUN_DIR/tensorboard.
    """
    if not any(directory.glob("events.out.tfevents.*")):
        return Events()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    accumulator = EventAccumulator(str(directory), {"scalars": 0, "images": 1, "histograms": 1, "tensors": 1})
    accumulator.Reload()
    tags = accumulator.Tags()
    curves: dict[str, Curve] = {}
    for tag in tags["scalars"]:
        values = {event.step: event.value for event in accumulator.Scalars(tag)}
        curves[tag] = sorted(values), [values[step] for step in sorted(values)]
    pictures = {tag: accumulator.Images(tag)[-1].encoded_image_string for tag in tags["images"]}
    return Events(curves, pictures)
