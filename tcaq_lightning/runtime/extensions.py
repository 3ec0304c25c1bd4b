"""Modules of a user's own, imported before anything is built, so that what they define registers itself."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from tcaq_lightning.errors import UserError


def load_extensions(extensions: Sequence[str]) -> dict[str, str]:
    """Import extensions: files whose name ends in .py, or dotted names of modules. Loaded extensions stay loaded.

    Args:
        extensions: in the order of import.

    Returns:
        SHA-256 of each one's file, by extension; empty for a module without a file.

    Raises:
        UserError: one is missing, or fails while it is imported.
    """
    return {name: _load(name, f"extensions[{number}]") for number, name in enumerate(extensions)}


def _load(extension: str, key: str) -> str:
    try:
        return _load_file(Path(extension), key) if extension.endswith(".py") else _load_module(extension)
    except UserError:
        raise
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"{key}: {extension} cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(path: Path, key: str) -> str:
    if not path.is_file():
        raise UserError(f"{key}: expected a Python file or the name of a module, got {path}; give an existing one")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"tcaq_lightning_extension_{path.stem}_{place}"  # the same in every process, so that it can be pickled
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return digest


def _load_module(name: str) -> str:
    file = importlib.import_module(name).__file__
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
