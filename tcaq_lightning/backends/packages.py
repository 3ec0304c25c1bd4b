"""Packages of extras, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from tcaq_lightning.errors import UserError


def require(module: str, extra: str) -> Any:
    """Import a package of an extra.

    Args:
        module: to be imported.
        extra: of this project that installs it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module} is not installed; expected the extra {extra!r}: pip install 'tcaq-lightning[{extra}]'"
        ) from error
