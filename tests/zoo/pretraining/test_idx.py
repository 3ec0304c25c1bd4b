from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from tcaq_lightning.errors import UserError
from tcaq_lightning.zoo.pretraining.idx import normalize, read_idx, read_split


def idx_bytes(values: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.numpy().tobytes()


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(5,), (3, 4, 2), (0, 28, 28)])
@pytest.mark.parametrize("name", ["values", "values.gz"])
def test_round_trip(tmp_path: Path, shape: tuple[int, ...], name: str) -> None:
    values = random_bytes(*shape)
    content = idx_bytes(values)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert torch.equal(read_idx(tmp_path / name), values)


def test_missing_file_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        read_idx(tmp_path / "train-images-idx3-ubyte.gz")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n",
        b"\0\0\x0d\x01\0\0\0\0",  # floats
        b"\0\0\x08\x03\0\0\0\x02",  # header cut off
        idx_bytes(random_bytes(2, 3))[:-1],
        idx_bytes(random_bytes(2, 3)) + b"\0",
    ],
)
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "values"
    path.write_bytes(content)
    with pytest.raises(UserError, match="fetch it again") as caught:
        read_idx(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [3, 20, -4])
def test_damaged_gzip(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "values.gz"
    path.write_bytes(gzip.compress(idx_bytes(random_bytes(50, 4)))[:keep])
    with pytest.raises(UserError, match="intact"):
        read_idx(path)


def test_split_prefers_gzip_and_checks_numbers(tmp_path: Path) -> None:
    images, labels = random_bytes(4, 28, 28), random_bytes(4) % 10
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    read_images, read_labels = read_split(tmp_path, "test")
    assert torch.equal(read_images, images)
    assert torch.equal(read_labels, labels.long())
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels[:3]))
    with pytest.raises(UserError, match=r"\(4, 28, 28\) and \(3,\)"):
        read_split(tmp_path, "test")
    with pytest.raises(UserError, match="split must be"):
        read_split(tmp_path, "valid")


def test_normalize_is_exactly_invertible() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    floats = normalize(values)
    assert floats.shape == (1, 1, 16, 16)
    assert torch.equal(((floats + 1) * 127.5).round().byte()[:, 0], values)
