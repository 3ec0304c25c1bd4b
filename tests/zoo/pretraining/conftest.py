from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tcaq_lightning.zoo.pretraining.training import Pretraining


class KilledError(Exception):
    """Ends a training in the middle."""


@contextmanager
def killed(kind: type[Pretraining], step: int) -> Iterator[None]:
    """A training of this kind dies within when it comes to a step."""
    whole = kind.training_step

    def dying(self: Pretraining, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            raise KilledError
        return whole(self, batch, batch_idx)

    with mock.patch.object(kind, "training_step", dying), pytest.raises(KilledError):
        yield


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes()))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in which half of the image is bright; 96 training and 80 test images."""
    directory = tmp_path_factory.mktemp("data")
    rng = torch.Generator().manual_seed(0)
    for split, count in (("train", 96), ("t10k", 80)):
        labels = torch.arange(count) % 2
        images = torch.randint(0, 100, (count, 28, 28), generator=rng)
        images[labels == 0, :14] += 150
        images[labels == 1, 14:] += 150
        write_idx(directory / f"{split}-images-idx3-ubyte.gz", images.byte())
        write_idx(directory / f"{split}-labels-idx1-ubyte.gz", labels.byte())
    return directory
