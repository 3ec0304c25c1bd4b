"""Images measured batch by batch: dealt to the ranks, finished batches kept on disk for a command that goes on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.images import ImageWriter
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.distributed.collectives import gather, is_main, on_main, rank, world_size
from tcaq_lightning.runtime.files import DamagedFileError, load_tensors, save_tensors
from tcaq_lightning.runtime.hashing import add_weights
from tcaq_lightning.runtime.one_line import one_line

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """Some images, or all of them.

    Attributes:
        samples: (num_kept, C, H, W) the first ones, in the model's range.
        features: by name, of those that are measured; empty on other ranks than the first.
        seconds: spent on them, also by the process that filled the cache.
        pixels: uint8 (B, C, H, W), to be written as pictures; None without a writer.
    """

    samples: Tensor
    features: dict[str, Tensor]
    seconds: float
    pixels: Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """How many images there are to be.

    Attributes:
        kept: number of samples to keep as they are.
        measured: number of images to take features of.
        names: of the features.
        batch_size: images in a batch, but for the last one.
    """

    kept: int
    measured: int
    names: Collection[str]
    batch_size: int

    @property
    def total(self) -> int:
        """Number of images."""
        return max(self.kept, self.measured)

    def size(self, start: int, limit: int | None = None) -> int:
        """How many images of the batch that begins with number `start` are below `limit`, by default all of them."""
        return max(0, min(start + self.batch_size, self.total if limit is None else limit) - start)


def in_batches(
    draw: Callable[[int], Batch],
    wanted: Wanted,
    directory: Path | None = None,
    writer: ImageWriter | None = None,
    advance: Callable[[int], None] | None = None,
) -> Batch:
    """Make all batches that are not in the cache yet, and put all of them together in the images' order.

    Batches are the same for any number of ranks and are dealt to them; rank 0 alone reads and writes files. A batch is
    written after its pictures.

    Args:
        draw: makes the batch that begins with an image's number.
        wanted: how many images there are to be.
        directory: the cache; None keeps none.
        writer: of pictures, on rank 0.
        advance: told the number of images just done.
    """
    starts = range(0, wanted.total, wanted.batch_size)
    files = _Files(wanted, directory, writer)
    batches: dict[int, Batch] = {}

    def finish(start: int, batch: Batch) -> None:
        batches[start] = _lightened(batch)
        if advance is not None:
            advance(wanted.size(start))

    found = on_main(lambda: [files.read(start) for start in starts])
    for start, values in zip(starts, found, strict=True):
        if values:
            finish(start, Batch(**values))
    missing = [start for start in starts if start not in batches]
    for first in range(0, len(missing), world_size()):
        dealt = missing[first : first + world_size()]  # one batch for each rank
        for start, batch in zip(dealt, _draw(draw, dealt), strict=True):
            on_main(partial(files.write, start, batch))
            finish(start, batch)
    return _joined([batches[start] for start in starts])


@dataclass(frozen=True)
class _Files:
    """Batches and pictures on disk, as rank 0 reads and writes them.

    Attributes:
        wanted: how many images there are to be.
        directory: of the batches; None keeps none.
        writer: of pictures, or None.
    """

    wanted: Wanted
    directory: Path | None
    writer: ImageWriter | None

    def read(self, start: int) -> dict[str, Any] | None:
        """Fields of a finished batch; None if it is not there whole, or a picture of it is missing."""
        if self.directory is None or (self.writer is not None and not self.writer.has(self._numbers(start))):
            return None
        return _read_batch(self._path(self.directory, start), self._place(start), start, self.wanted)

    def write(self, start: int, batch: Batch) -> None:
        """Write the pictures of a batch, then the batch."""
        if self.writer is not None and batch.pixels is not None:
            self.writer.write(self._numbers(start), batch.pixels)
        if self.directory is not None:
            tensors = {"samples": batch.samples, **batch.features}
            save_tensors(self._path(self.directory, start), tensors, {"seconds": batch.seconds}, self._place(start))

    def _place(self, start: int) -> dict[str, Any]:
        """What a batch is of, in its file; the directory is named by all that determines the images."""
        return {"images": None if self.directory is None else self.directory.name, "start": start}

    def _path(self, directory: Path, start: int) -> Path:
        return directory / f"{start:06d}.safetensors"

    def _numbers(self, start: int) -> range:
        return range(start, start + self.wanted.size(start))


def _joined(batches: Sequence[Batch]) -> Batch:
    """All batches as one, in their order."""
    measured = [batch.features for batch in batches if batch.features]
    names = measured[0] if measured else {}
    return Batch(
        torch.cat([batch.samples for batch in batches]),
        {name: torch.cat([features[name] for features in measured]) for name in names},
        sum(batch.seconds for batch in batches),
    )


def _draw(draw: Callable[[int], Batch], dealt: Sequence[int]) -> list[Batch]:
    """One batch on each rank, all of them on every rank; what a rank's images make it complain of is raised on all."""
    values: dict[str, Any] = {}
    error = None
    try:
        if rank() < len(dealt):
            values = vars(draw(dealt[rank()]))
    except UserError as raised:
        error = raised
    drawn = gather((values, error))
    for _, error in drawn:
        if error is not None:
            raise error
    return [Batch(**values) for values, _ in drawn[: len(dealt)]]


def _lightened(batch: Batch) -> Batch:
    """What is needed later on: features on the first rank, pictures nowhere."""
    return Batch(batch.samples, batch.features if is_main() else {}, batch.seconds)


def _read_batch(path: Path, place: Any, start: int, wanted: Wanted) -> dict[str, Any] | None:
    """Fields of a batch in the cache; None if it is missing, damaged, or holds other numbers of samples or features."""
    if not path.exists():
        return None
    keep, measure = wanted.size(start, wanted.kept), wanted.size(start, wanted.measured)
    try:
        tensors, record = load_tensors(path, place)
        samples, seconds = tensors["samples"], float(record["seconds"])
    except DamagedFileError as error:
        log.warning("%s; making this batch again", error)
        return None
    except (KeyError, TypeError, ValueError) as error:
        log.warning("%s holds no batch of images (%s); making it again", path, one_line(error))
        return None
    features = {name: tensors[name] for name in wanted.names if name in tensors} if measure else {}
    if len(samples) != keep or any(len(features.get(name, ())) != measure for name in wanted.names):
        return None
    return {"samples": samples, "features": features, "seconds": seconds}


def fingerprint(models: Sequence[nn.Module], key: Any) -> str:
    """Name for everything that determines images and their features.

    Args:
        models: with their weights and settings.
        key: JSON-ready.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode())
    for model in models:
        for name, module in model.named_modules():
            # Bits, kinds and timestep groups are plain attributes, in no state dict.
            settings = {k: str(v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, Enum))}
            groups = getattr(module, "groups", None)
            boundaries = groups.boundaries if isinstance(groups, TimestepGroups) else None
            digest.update(json.dumps([name, type(module).__name__, settings, boundaries], sort_keys=True).encode())
        add_weights(digest, model)
    return digest.hexdigest()[:20]
