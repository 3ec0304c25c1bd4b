"""Prompts from a text file."""

from __future__ import annotations

from pathlib import Path

from tcaq_lightning.errors import UserError


def read_prompts(path: Path, key: str) -> list[str]:
    """Prompts from a text file, one a line; blank lines are left out.

    Args:
        path: the file.
        key: config key that errors name.

    Raises:
        UserError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot read {path}: {error}; expected a text file with one prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{key}: {path} is empty; expected one prompt a line")
    return prompts
