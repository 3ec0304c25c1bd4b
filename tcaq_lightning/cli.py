"""Command line and YAML of `train.py`: one typed `Config`, or one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from tcaq_lightning.config import Config
from tcaq_lightning.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse_config(argv: Sequence[str] | None = None) -> tuple[Config, bool]:
    """Read `--config FILE`, `--any.key VALUE` overrides and `--dry_run`.

    Args:
        argv: arguments, or None for the process's own.

    Returns:
        The configuration, and whether only the plan is wanted.

    Raises:
        UserError: unknown or mistyped keys, values out of range, an unreadable file.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    for path in _config_files(arguments):
        _check_keys(_read_yaml(path), Config, path)
    parser = ArgumentParser(prog="train.py", description="Quantize a diffusion model by TCAQ-DM.", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; later arguments override it")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and the coverage, and stop")
    parser.add_class_arguments(Config, fail_untyped=True)
    try:
        parsed = parser.parse_args(arguments)
        made = parser.instantiate(parsed)
    except ArgumentError as error:
        raise UserError(_readable(error)) from error
    values = {f.name: made[f.name] for f in dataclasses.fields(Config)}
    return Config(**{k: _plain(v) for k, v in values.items()}), bool(made["dry_run"])


def _config_files(arguments: list[str]) -> list[Path]:
    following = [b for a, b in pairwise(arguments) if a == "--config"]
    joined = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    return [Path(path) for path in (*following, *joined)]


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error}); expected a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: no valid YAML: {' '.join(str(error).split())}") from error


def _check_keys(values: Any, kind: type, path: Path, prefix: str = "") -> None:
    """Every key of a YAML file is a field; the parser itself lets an unknown key with an empty value pass."""
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: {prefix or 'the file'} must hold keys and values, got {values!r}")
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            raise UserError(f"--config {path}: unknown key {name}; expected one of {', '.join(hints)}")
        nested = [t for t in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(t)]
        if nested and isinstance(value, list):
            for i, item in enumerate(value):
                _check_keys(item, nested[0], path, f"{name}[{i}]")  # type: ignore[arg-type]
        elif nested and value is not None:
            _check_keys(value, nested[0], path, name)  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    return vars(value) if isinstance(value, Namespace) else value


def _readable(error: ArgumentError) -> str:
    """The innermost cause in one line; a `UserError` raised by a dataclass speaks for itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())
