"""Prompts from a text file."""

from __future__ import annotations

from pathlib import Path

from tcaq_lightning.errors import UserError

LARGEST = 1 << 26
"""Bytes of a file."""


def read_prompts(path: Path, key: str) -> list[str]:
    """Prompts from a text file, one a line; blank lines are left out.

    Args:
        path: the file.
        key: config key that errors name.

    Raises:
        UserError: it cannot be read, or has none.
    """
    try:
        with path.open("rb") as stream:  # some files, such as devices, have no end
            content = stream.read(LARGEST + 1)
        lines = content.decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: cannot read {path}: {error}; expected a text file with one prompt a line") from error
    if len(content) > LARGEST:
        raise UserError(f"{key}: {path} has more than {LARGEST} bytes; expected a text file with one prompt a line")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{key}: {path} is empty; expected one prompt a line")
    return prompts
