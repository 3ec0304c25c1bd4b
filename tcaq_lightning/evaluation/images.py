"""Sets of images on disk: a folder of pictures or an array in an .npz, read in a fixed order and written losslessly."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.arrays import ARCHIVE_ERRORS, open_array
from tcaq_lightning.models.pipelines import to_images
from tcaq_lightning.runtime.files import replacing, write_json
from tcaq_lightning.runtime.json_files import read_json

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, struct.error, zlib.error)
"""What Pillow's decoders raise on damaged files, each its own."""
IMAGES_ARRAY = "arr_0"
"""Name of the images in an .npz of the guided-diffusion evaluations."""
SOURCE_FILE = "source.json"
"""Beside written images: what they were made with."""


def to_pixels(samples: Tensor) -> Tensor:
    """Bytes of samples, by the rule of the published samplers: clipped to [0, 1], times 255, rounded half up.

    Args:
        samples: float, in the model's range [-1, 1].

    Returns:
        uint8, the same shape; NaN gives 0.

    >>> to_pixels(torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0]))
    tensor([  0,   0, 128, 255, 255], dtype=torch.uint8)
    """
    return to_images(samples.float()).nan_to_num(0).mul(255).add(0.5).clamp(0, 255).to(torch.uint8)


class ImageSet(Protocol):
    """Images of one size in a fixed order."""

    path: Path

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), C being 1 or 3."""

    @property
    def identity(self) -> list[Any]:
        """JSON-ready; it changes when the files change."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 (B, C, H, W)."""


@dataclass
class ImageFolder:
    """Pictures below a directory, in the order of their relative names."""

    path: Path
    files: list[Path]
    shape: tuple[int, int, int]

    @property
    def identity(self) -> list[Any]:
        """Names, sizes and times of change."""
        facts = ((f, f.stat()) for f in self.files)
        return [[str(f.relative_to(self.path)), s.st_size, s.st_mtime_ns] for f, s in facts]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Pixels of some of the pictures, uint8 (B, C, H, W).

        Raises:
            UserError: a file is damaged.
        """
        return torch.stack([self._pixels(self.files[i]) for i in indices])

    def _pixels(self, file: Path) -> Tensor:
        try:
            with Image.open(file) as picture:
                pixels = np.array(picture.convert(_mode(picture)))
        except (*PICTURE_ERRORS, Image.DecompressionBombError) as error:
            raise UserError(f"expected an image in {file}, got {error}; remove the file or write it again") from None
        if pixels.shape[:2] != self.shape[1:]:
            raise UserError(f"expected an image of {self.shape[1:]} in {file}, got {pixels.shape[:2]}; write it again")
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


@dataclass
class ImageArray:
    """The array `arr_0` of an .npz, uint8 (N, H, W, C), read piece by piece."""

    path: Path
    count: int
    shape: tuple[int, int, int]
    _stream: BinaryIO
    _offset: int

    @property
    def identity(self) -> list[Any]:
        """Size and time of change of the file."""
        facts = self.path.stat()
        return [facts.st_size, facts.st_mtime_ns]

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Tensor:
        """Pixels of some of the images, uint8 (B, C, H, W).

        Raises:
            UserError: the file is damaged.
        """
        channels, height, width = self.shape
        size = channels * height * width
        parts = []
        try:
            for i in indices:
                self._stream.seek(self._offset + i * size)
                part = self._stream.read(size)
                if len(part) < size:
                    raise ValueError("its end too early")
                parts.append(np.frombuffer(part, dtype=np.uint8))
        except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(
                f"expected {self.count} images in {self.path}, got {error}; write or download the file again"
            ) from None
        return torch.from_numpy(np.stack(parts)).view(-1, height, width, channels).permute(0, 3, 1, 2)


def open_images(path: Path, key: str) -> ImageSet:
    """Images of a folder or an .npz; only the headers of the pictures are read yet.

    Args:
        path: directory with pictures, also in its subdirectories, or an .npz with uint8 `arr_0` (N, H, W, C).
        key: of the configuration, for messages.

    Raises:
        UserError: there are no images, or not all of one size.
    """
    if path.is_dir():
        return _open_folder(path, key)
    if path.suffix == ".npz" and path.is_file():
        return _open_array(path, key)
    raise UserError(f"{key}: expected a folder of images or an .npz, got {path}; give one that exists")


def _open_folder(path: Path, key: str) -> ImageFolder:
    files = sorted(
        (f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file()),
        key=lambda f: f.relative_to(path).as_posix(),
    )
    if not files:
        raise UserError(f"{key}: expected images ({', '.join(sorted(SUFFIXES))}) in {path}, got none; check the path")
    first = _header(files[0])
    for file in files[1:]:
        shape = _header(file)
        if shape != first:
            raise UserError(
                f"{key}: expected images of (channels, height, width) {first} as {files[0]}, got {shape} in {file}; "
                "crop and resize them to one size"
            )
    return ImageFolder(path, files, first)


def _header(file: Path) -> tuple[int, int, int]:
    try:
        with Image.open(file) as picture:
            return 1 if _mode(picture) == "L" else 3, picture.height, picture.width
    except (*PICTURE_ERRORS, Image.DecompressionBombError) as error:
        raise UserError(f"expected an image in {file}, got {error}; remove the file or write it again") from None


def _mode(picture: Image.Image) -> str:
    """L or RGB: what the pixels are read as."""
    if picture.mode in {"1", "L"}:
        return "L"
    if picture.mode in {"RGB", "P", "CMYK", "YCbCr"}:
        return "RGB"
    raise ValueError(f"mode {picture.mode} instead of 8-bit grey or RGB without transparency")


def _open_array(path: Path, key: str) -> ImageArray:
    try:
        stream, header = open_array(zipfile.ZipFile(path), f"{IMAGES_ARRAY}.npy")
        shape, fortran, dtype = header.shape, header.fortran, header.dtype
    except ARCHIVE_ERRORS as error:
        raise UserError(
            f"{key}: expected uint8 images `{IMAGES_ARRAY}` in {path}, got {' '.join(str(error).split())}; "
            "give an .npz of images"
        ) from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in {1, 3} or fortran or 0 in shape:
        raise UserError(
            f"{key}: expected uint8 images `{IMAGES_ARRAY}` of (N, height, width, 1 or 3) in {path}, "
            f"got {dtype} {shape}; write them so"
        )
    count, height, width, channels = shape
    if header.nbytes > header.held:
        raise UserError(
            f"{key}: expected {count} images in {path}, got {header.held} bytes, fewer than they take; write or "
            "download the file again"
        )
    return ImageArray(path, count, (channels, height, width), cast("BinaryIO", stream), stream.tell())


class ImageWriter:
    """Numbered PNG files of one set of images, written by one rank.

    Args:
        directory: new or empty, or holding images that were written for the same source.
        source: what the images are made with, as a checksum.

    Raises:
        UserError: the directory holds something else.
    """

    def __init__(self, directory: Path, source: str) -> None:
        self.directory = directory
        try:
            found = read_json(directory / SOURCE_FILE)["source"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found != source and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(
                f"evaluation.save_images: expected a new or empty directory, or one with images of the same model and "
                f"settings, got {directory}; give another one"
            )
        write_json(directory / SOURCE_FILE, {"source": source})

    def path(self, index: int) -> Path:
        """File of an image."""
        return self.directory / f"{index:06d}.png"

    def has(self, indices: Sequence[int]) -> bool:
        """Whether all of these images are there."""
        return all(self.path(i).is_file() for i in indices)

    def write(self, indices: Sequence[int], pixels: Tensor) -> None:
        """Write images, each one atomically.

        Args:
            indices: their numbers.
            pixels: uint8 (B, C, H, W), C being 1 or 3.
        """
        for i, image in zip(indices, pixels, strict=True):
            array = (image[0] if len(image) == 1 else image.permute(1, 2, 0)).contiguous().numpy()
            with replacing(self.path(i)) as temporary:
                Image.fromarray(array).save(temporary, format="PNG")
