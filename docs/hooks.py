"""What the site takes from elsewhere: pages from the files of the root, config keys from the dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tcaq_lightning.config import Config

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put generated text in the place of its marks (a hook of MkDocs)."""
    for name, make in GENERATED.items():
        mark = f"<!-- generated: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def page(name: str) -> str:
    """A file of the repository's root, its links as seen from docs/."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](").replace("[License](LICENSE)", "License")
    return text.replace("](CONTRIBUTING.md", "](contributing.md").replace("](CHANGELOG.md", "](changelog.md")


def config_files() -> str:
    """A table of the shipped configs by the first sentence of their headers."""
    rows = ["| config | what it is |", "|---|---|"]
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        header = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            header.append(line.lstrip("# "))
        first = " ".join(header).split(". ")[0].split("  ")[0].rstrip(".:").replace("|", "\\|")
        rows.append(f"| `{path.relative_to(ROOT)}` | {first} |")
    return "\n".join(rows)


def keys() -> str:
    """All keys, a section for each dataclass."""
    return "\n\n".join(_sections(Config, ""))


def _sections(kind: Any, prefix: str) -> Iterator[str]:
    hints, docs = typing.get_type_hints(kind), _docs(kind)
    rows, inner = [], []
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name}"
        nested = [t for t in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(t)]
        if nested and hints[field.name] is nested[0]:
            inner += list(_sections(nested[0], f"{name}."))
            continue
        rows.append(f"| `{name}` | {_type(hints[field.name])} | {_default(field)} | {docs[field.name]} |")
        inner += list(_sections(nested[0], f"{name}[].")) if nested and "list" in str(hints[field.name]) else []
    if rows:
        title = prefix.rstrip(".") or "Top level"
        about = " ".join((kind.__doc__ or "").split())
        yield "\n".join([f"### {title}", "", about, "", "| key | type | default | |", "|---|---|---|---|", *rows])
    yield from inner


def _docs(kind: type) -> dict[str, str]:
    """The docstring under each field."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    found, name = {}, ""
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and name:
            found[name] = " ".join(str(statement.value.value).split()).replace("|", "\\|")
            name = ""
    return found


def _type(hint: Any) -> str:
    """A type as YAML knows it, without the modules that it comes from."""
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    text = re.sub(r"\b(?:\w+\.)+", "", text).replace("NoneType", "null").replace("None", "null")
    text = re.sub(r"Optional\[(.*)\]", r"\1 | null", text)
    return "`" + re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), text) + "`"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_yaml(field.default)}`"
    return f"`{_yaml(field.default_factory())}`" if field.default_factory is not dataclasses.MISSING else "required"


def _yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


GENERATED = {
    "readme": partial(page, "README.md"),
    "contributing": partial(page, "CONTRIBUTING.md"),
    "changelog": partial(page, "CHANGELOG.md"),
    "files": config_files,
    "keys": keys,
}
