"""What the site takes from elsewhere: pages from the files of the root, config keys from the dataclasses."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tcaq_lightning.config import Config
from tcaq_lightning.config.keys import keys_of, shown, type_name

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
            if not line.startswith("# "):
                break
            header.append(line.removeprefix("# "))
        first = " ".join(header).split(". ")[0].rstrip(".:").replace("|", "\\|")
        rows.append(f"| `{path.relative_to(ROOT)}` | {first} |")
    return "\n".join(rows)


def keys() -> str:
    """All keys, a table for each section."""
    return "\n\n".join(_sections(Config, ""))


def _sections(kind: type, prefix: str) -> Iterator[str]:
    rows, inner = [], []
    for key in keys_of(kind):
        name = f"{prefix}{key.name}"
        if key.section is not None and key.default is not None:
            inner += list(_sections(key.section, f"{name}."))
            continue
        default = "required" if key.default is dataclasses.MISSING else f"`{shown(key.default)}`"
        doc = _linked(key.doc).replace("|", "\\|")
        rows.append(f"| `{name}` | `{type_name(key.hint)}` | {default} | {doc} |")
        inner += [s for item in _items(key.hint) for s in _sections(item, f"{name}[].")]
    if rows:
        title, about = prefix.rstrip(".") or "Top level", _linked(" ".join((kind.__doc__ or "").split()))
        yield "\n".join([f"### {title}", "", about, "", "| key | type | default | |", "|---|---|---|---|", *rows])
    yield from inner


def _linked(text: str) -> str:
    """Citations of the method as links to its headings."""
    return re.sub(
        r'docs/method\.md, "([^"]+)"', lambda m: f"[{m[1]}](method.md#{m[1].lower().replace(' ', '-')})", text
    )


def _items(hint: Any) -> list[type]:
    """The dataclass of which a key holds a list."""
    return [t for t in typing.get_args(hint) if dataclasses.is_dataclass(t) and typing.get_origin(hint) is list]


GENERATED = {
    "readme": partial(page, "README.md"),
    "contributing": partial(page, "CONTRIBUTING.md"),
    "changelog": partial(page, "CHANGELOG.md"),
    "files": config_files,
    "keys": keys,
}
