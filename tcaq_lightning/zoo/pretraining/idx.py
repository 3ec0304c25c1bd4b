"""Reading IDX files, the format of MNIST and its descendants."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from tcaq_lightning.errors import UserError

SPLITS = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 0x08
_DEBIAN_PACKAGE = "the Debian package dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist"


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzipped.

    The file is two zero bytes, the type (0x08), the number of dimensions, one big-endian 32-bit size for each of
    them, then the values in row-major order (LeCun, Cortes and Burges, "The MNIST database").

    Args:
        path: the file; a name ending in `.gz` is decompressed.

    Returns:
        A uint8 tensor of the shape the header states.

    Raises:
        UserError: no such file, not IDX, another element type, or fewer or more values than the header states.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise UserError(f"expected an IDX file at {path}, found none; {_DEBIAN_PACKAGE}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"expected an intact file at {path}, got {error}; fetch it again") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise UserError(
            f"expected an IDX file of unsigned bytes (0x00000801 or 0x00000803) at {path}, "
            f"got 0x{content[:4].hex()}; fetch it again"
        )
    rank = content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise UserError(f"expected {start} bytes of header in {path}, got {len(content)}; fetch it again")
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"expected {math.prod(shape)} values in {path} for its shape {shape}, got {len(content) - start}; "
            "fetch it again"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)


def read_split(directory: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one split of an MNIST-like data set.

    Args:
        directory: holds `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte` and so on, plain or with `.gz`.
        split: "train" or "test".

    Returns:
        Images, uint8 (N, H, W), and labels, int64 (N,).

    Raises:
        UserError: a file is missing or damaged, or images and labels differ in number.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {sorted(SPLITS)}, got {split!r}")
    images = read_idx(_find(directory, f"{SPLITS[split]}-images-idx3-ubyte"))
    labels = read_idx(_find(directory, f"{SPLITS[split]}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise UserError(
            f"expected images (N, H, W) and labels (N,) in {directory}, "
            f"got {tuple(images.shape)} and {tuple(labels.shape)}; fetch the {split} files again"
        )
    return images, labels.long()


def normalize(images: Tensor) -> Tensor:
    """Bytes to [-1, 1] with a channel axis.

    Args:
        images: uint8 (N, H, W).

    Returns:
        float32 (N, 1, H, W).

    >>> normalize(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    tensor([[[[-1.,  1.]]]])
    """
    return images.unsqueeze(1).float() / 127.5 - 1


def _find(directory: Path, name: str) -> Path:
    """The gzipped file if there is one, else the plain one."""
    compressed = directory / f"{name}.gz"
    return compressed if compressed.exists() else directory / name
