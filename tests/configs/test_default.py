"""`configs/default.yaml` documents every key, with the default."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from tcaq_lightning.cli import parse_config
from tcaq_lightning.cli.config import default_file
from tcaq_lightning.config import Config

DEFAULT = Path(__file__).parents[2] / "configs" / "default.yaml"


def keys(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields; a field that may be null counts as one key."""
    found, hints = [], typing.get_type_hints(kind)
    for name in (field.name for field in dataclasses.fields(kind)):
        nested = dataclasses.is_dataclass(hints[name])
        found += [f"{prefix}{name}", *(keys(hints[name], f"{prefix}{name}.") if nested else [])]
    return found


def documented(text: str) -> set[str]:
    """Dotted names of the keys of a YAML text that stand right under a comment."""
    found, stack, commented = set(), [], False
    for line in text.splitlines():
        stripped = line.strip()
        depth = (len(line) - len(line.lstrip())) // 2
        if stripped.startswith("#"):
            commented = True
        elif stripped and not stripped.startswith("- "):
            stack[depth:] = [stripped.split(":")[0]]
            if commented:
                found.add(".".join(stack))
            commented = False
    return found


def test_it_is_what_the_dataclasses_say() -> None:
    assert DEFAULT.read_text() == default_file(), "python -m tcaq_lightning config > configs/default.yaml"


def test_every_key_is_there_and_documented() -> None:
    assert documented(DEFAULT.read_text()) == set(keys(Config))


def test_it_holds_the_defaults() -> None:
    config, dry_run = parse_config(["--config", str(DEFAULT)])
    assert (config, dry_run) == (Config(), False)
