"""Arrays in .npz files of others: looked at before they are read, and never unpickled."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

LARGEST = 1 << 30
"""Bytes of an array of statistics."""
ARCHIVE_ERRORS = (OSError, ValueError, KeyError, EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile)
"""What opening and reading raise of a file that is no .npz, is damaged, or lacks an array."""


@dataclass(frozen=True)
class ArrayHeader:
    """What the head of an .npy file says.

    Attributes:
        shape: of the array, all at least 0.
        dtype: of its elements.
        fortran: whether the first axis is the fastest.
        held: bytes that follow it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    held: int

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def open_array(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], ArrayHeader]:
    """A member of an archive, at its first element, and its head.

    Args:
        archive: an open .npz.
        name: of the member, with its ending.

    Raises:
        KeyError: there is none of that name.
        ValueError: it is no .npy file of numbers.
    """
    stream = archive.open(name)
    version = np.lib.format.read_magic(stream)
    if version not in {(1, 0), (2, 0)}:
        raise ValueError(f"{name} of format {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if any(size < 0 for size in shape) or dtype.kind not in "fiu":
        raise ValueError(f"{name} of {dtype} {shape}")
    return stream, ArrayHeader(shape, dtype, fortran, archive.getinfo(name).file_size - stream.tell())


def read_numbers(archive: zipfile.ZipFile, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """An array of an archive as float64.

    Args:
        archive: an open .npz.
        name: of the member, with its ending.

    Raises:
        KeyError, ValueError: as in `open_array`; also if it is larger than any statistics, or too short.
    """
    stream, header = open_array(archive, name)
    with stream:
        if header.nbytes > min(LARGEST, header.held):
            raise ValueError(f"{name} of {header.dtype} {header.shape} in {header.held} bytes")
        content = stream.read(header.nbytes)
        if len(content) < header.nbytes:
            raise ValueError(f"the end of {name} too early")
    flat = np.frombuffer(content, dtype=header.dtype).astype(np.float64)
    return flat.reshape(header.shape, order="F" if header.fortran else "C")
