"""Checksums within exported graphs: a graph with one changed bit is not opened.

A graph's own properties hold the SHA-256 of its file, taken with zeros in the checksum's place. An OpenVINO IR holds
that of its .xml file, and that of the .bin file beside it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.files import sha256

KEY = "tcaq_lightning_sha256"
"""Name of the property."""
WEIGHTS_KEY = "tcaq_lightning_bin_sha256"
"""Name of an IR's property of its .bin file."""
WEIGHTS_PLACEHOLDER = f"tcaq:bin:{'0' * 64}"
"""What that property is before the .bin file is written."""
_PREFIX, _ZEROS = b"tcaq:own:", b"0" * 64
_PLACE = re.compile(rb"tcaq:own:([0-9a-f]{64})")
PLACEHOLDER = (_PREFIX + _ZEROS).decode()
"""What the property is before the file is finished."""


def sealed(content: bytes) -> bytes:
    """A file whose property is `PLACEHOLDER`, with its checksum there.

    Raises:
        ValueError: it is not there once.

    >>> sealed(b"x " + PLACEHOLDER.encode()) == b"x " + PLACEHOLDER.encode()
    False
    """
    if content.count(PLACEHOLDER.encode()) != 1:
        raise ValueError("expected one place for the checksum")
    digest = hashlib.sha256(content).hexdigest().encode()
    return content.replace(_PREFIX + _ZEROS, _PREFIX + digest)


def with_weights(content: bytes, digest: str) -> bytes:
    """An .xml file whose property is `WEIGHTS_PLACEHOLDER`, with the SHA-256 of its .bin file there."""
    return content.replace(WEIGHTS_PLACEHOLDER.encode(), digest.encode())


def is_sealed(content: bytes) -> bool:
    """Whether a file's checksum fits it.

    >>> content = sealed(b"x " + PLACEHOLDER.encode())
    >>> is_sealed(content), is_sealed(b"y" + content[1:]), is_sealed(b"x")
    (True, False, False)
    """
    found = _PLACE.findall(content)
    if len(found) != 1:
        return False
    blank = content.replace(_PREFIX + found[0], _PREFIX + _ZEROS)
    return bool(hashlib.sha256(blank).hexdigest() == found[0].decode())


def check_graph(file: Path) -> None:
    """Check that an exported graph's files are as they were written.

    Args:
        file: .onnx, or .xml with a .bin beside it.

    Raises:
        UserError: they are not.
    """
    content = file.read_bytes()
    if not is_sealed(content):
        raise UserError(
            f"{file} is damaged, or not a graph that this release of tcaq-lightning exported: its checksum does not "
            "fit; export it again"
        )
    if file.suffix == ".xml":
        weights = file.with_suffix(".bin")
        if not weights.is_file():
            raise UserError(f"{weights} is missing: it belongs to {file.name}; copy it, or export the graph again")
        if sha256(weights).encode() not in content:
            raise UserError(f"{weights} is damaged: its checksum is not that in {file.name}; export the graph again")
