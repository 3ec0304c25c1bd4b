"""What the dataclasses say about their keys: description, type, default; and all keys as one documented YAML file."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

WIDTH = 120
"""Columns of the documented YAML."""


@dataclass(frozen=True)
class Key:
    """One key of a section.

    Attributes:
        name: of the field.
        hint: its type.
        default: its value where nothing is given, `dataclasses.MISSING` if it has to be given.
        doc: the docstring under the field, in one line.
    """

    name: str
    hint: Any
    default: Any
    doc: str

    @property
    def section(self) -> type | None:
        """The dataclass that the value is made of, if it is one or null."""
        return section_of(self.hint)


@cache
def keys_of(kind: type) -> tuple[Key, ...]:
    """The keys of a dataclass, in its order.

    >>> from tcaq_lightning.config import DAQConfig
    >>> [key.name for key in keys_of(DAQConfig)]
    ['enabled', 'rule', 'family']
    """
    hints, docs = typing.get_type_hints(kind), _docs(kind)
    return tuple(Key(f.name, hints[f.name], _default(f), docs.get(f.name, "")) for f in dataclasses.fields(kind))


def section_of(hint: Any) -> type | None:
    """The dataclass in `SamplerConfig` or `SamplerConfig | None`; None of any other type."""
    found = [t for t in (hint, *(typing.get_args(hint) if _is_union(hint) else ())) if dataclasses.is_dataclass(t)]
    return found[0] if found and isinstance(found[0], type) else None


def documented_yaml(kind: type) -> str:
    """All keys of a configuration with description, type and default, as a YAML file that holds the defaults.

    Args:
        kind: the dataclass, such as `Config`.
    """
    return "\n".join(_lines(kind, "", blank=True)).strip() + "\n"


def type_name(hint: Any) -> str:
    """A type in the words of YAML.

    >>> type_name(list[int] | None), type_name(Literal["a", "b"])
    ('list of int | null', 'a | b')
    """
    if _is_union(hint):
        return " | ".join(type_name(t) for t in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is list:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    names = {Path: "path", type(None): "null", Any: "any"}
    return str(names.get(hint, getattr(hint, "__name__", hint)))


def shown(value: Any) -> str:
    """A value as YAML writes it, in one line.

    >>> shown(None), shown(0.01), shown([])
    ('null', '0.01', '[]')
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    text = yaml.safe_dump(str(value) if isinstance(value, Path) else value, default_flow_style=True, width=10**6)
    return text.strip().removesuffix("...").strip()


def _lines(kind: type, indent: str, blank: bool = False) -> Iterator[str]:
    for key in keys_of(kind):
        if blank:
            yield ""
        section = key.section
        if section is not None and key.default is not None:
            yield from _comment(key.doc, indent)
            yield f"{indent}{key.name}:"
            yield from _lines(section, indent + "  ")
        else:
            yield from _comment(f"{key.doc} ({type_name(key.hint)}, default: {shown(key.default)})", indent)
            yield f"{indent}{key.name}: {shown(key.default)}"


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(
        text, WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False, break_long_words=False
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, those that it inherits included."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(node, ast.ClassDef)
        name = ""
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name = statement.target.id
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and name:
                found[name] = " ".join(str(statement.value.value).split())
                name = ""
    return found
