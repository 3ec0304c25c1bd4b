"""Help that fits a screen: what a command does, its options, the sections of keys, one example."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, NoReturn

from tcaq_lightning.cli.arguments import Option
from tcaq_lightning.config.keys import section_of, shown, type_name

WIDTH = 100
COLUMN = 24


@dataclass(frozen=True)
class Description:
    """What a function's docstring says.

    Attributes:
        about: its first paragraphs.
        docs: by parameter.
        example: one command line.
    """

    about: str
    docs: dict[str, str]
    example: str

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Description:
        """Take a docstring with the sections `Args` and `Example` apart."""
        text, _, example = inspect.cleandoc(function.__doc__ or "").partition("\nExample:\n")
        head, _, arguments = text.partition("\nArgs:\n")
        docs = {}
        for entry in re.split(r"\n(?=    \w+:)", f"\n{arguments}"):
            name, _, text = entry.strip().partition(":")
            docs[name] = " ".join(text.split())
        return cls(head.strip(), docs, example.strip())


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether `--help` or `--help_all` is among the arguments."""
    return any(a in ("-h", "--help", "--help_all") for a in arguments)


def show_help(program: str, about: str, example: str, options: Sequence[Option], arguments: Sequence[str]) -> NoReturn:
    """Print a command's help and end.

    Args:
        program: how the command is called.
        about: what it does.
        example: one command line.
        options: of the command; those with a dot in their name are told by section alone, but with `--help_all`.
        arguments: of the process.
    """
    everything = "--help_all" in arguments
    places = [o for o in options if o.positional]
    sections = [o for o in options if section_of(o.hint) is not None and "." not in o.name]
    plain = [o for o in options if o not in places and o not in sections and (everything or "." not in o.name)]
    usage = " ".join(["usage:", program, *(o.name.upper() for o in places), "[options]"])
    lines = [usage, "", *textwrap.wrap(about, WIDTH), ""]
    lines += [line for o in places for line in _entry(o.name.upper(), o.doc)]
    lines += [line for o in plain for line in _entry(f"--{o.name}", _full(o))]
    if sections and not everything:
        lines += ["", "keys (--help_all describes them; so does docs/configs.md):"]
        lines += [line for o in sections for line in _entry(f"--{o.name}.*", _keys(o, options))]
    lines += ["", "example:", *textwrap.wrap(example, WIDTH - 2, initial_indent="  ", subsequent_indent="    ")]
    sys.stdout.write("\n".join(lines) + "\n")
    raise SystemExit(0)


def _full(option: Option) -> str:
    default = "" if option.default is MISSING or option.default is None else f", default: {shown(option.default)}"
    return f"{option.doc.rstrip('.')} ({type_name(option.hint)}{default})"


def _keys(section: Option, options: Sequence[Option]) -> str:
    prefix = f"{section.name}."
    inner = [o for o in options if o.name.startswith(prefix) and "." not in o.name.removeprefix(prefix)]
    nested = [o for o in inner if section_of(o.hint) is not None or type_name(o.hint) == "mapping"]
    return ", ".join(o.name.removeprefix(prefix) + (".*" if o in nested else "") for o in inner)


def _entry(name: str, text: str) -> list[str]:
    indent = " " * COLUMN
    body = textwrap.wrap(text, WIDTH - COLUMN, break_on_hyphens=False) or [""]
    head = f"  {name}"
    if len(head) >= COLUMN:
        return [head, *(indent + line for line in body)]
    return [head.ljust(COLUMN) + body[0], *(indent + line for line in body[1:])]
