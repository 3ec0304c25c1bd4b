"""The page: its elements, and the template that makes HTML of them. Everything from files is escaped here."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeAlias

from markupsafe import Markup, escape

if TYPE_CHECKING:
    import jinja2
    from matplotlib.figure import Figure as Plot

INK = "#010203"
"""Colour of text and lines in plots; the page's own text colour takes its place."""
COLOURS = ("#2f7fd0", "#e07b39", "#3a9d6e", "#b05bc4", "#c9a227", "#d1495b")
"""Of data; each is told apart from a white and from a dark ground."""
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.fontsize": 8,
    "legend.framealpha": 0,
    "lines.markersize": 5,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "tcaq-lightning",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def plot_style() -> Iterator[None]:
    """Matplotlib's settings for plots of the page: transparent, text as text, the page's ink."""
    import matplotlib as mpl
    from cycler import cycler

    settings: Any = {**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)}
    with mpl.rc_context(settings):
        yield


@dataclass(frozen=True)
class Figure:
    """A picture with what it shows.

    Attributes:
        picture: HTML of the picture.
        caption: what one sees and how to read it.
        wide: it takes the page's width and scrolls sideways on a small screen.
    """

    picture: Markup
    caption: str
    wide: bool = False
    kind: str = "figure"


@dataclass(frozen=True)
class Column:
    """A column of a table: its title and how to show its values, by a name of `FORMATS`."""

    title: str
    form: str = "text"


@dataclass(frozen=True)
class Table:
    """A table whose columns can be sorted.

    Attributes:
        caption: what the rows are.
        columns: titles and formats.
        rows: one value for each column; None where there is none.
        folded: shown on demand only.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    folded: bool = False
    kind: str = "table"

    def cells(self) -> list[list[tuple[str, str, str]]]:
        """(class, sorting key, text) of every cell."""
        return [
            [
                ("" if c.form in {"text", "code"} else "number", _key(value), FORMATS[c.form](value))
                for c, value in zip(self.columns, row, strict=True)
            ]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Text:
    """A paragraph; a `note` stands out."""

    text: str
    kind: str = "text"


def note(text: str) -> Text:
    """A paragraph that stands out."""
    return Text(text, kind="note")


@dataclass(frozen=True)
class Code:
    """Text as it is, such as a configuration; shown on demand."""

    title: str
    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Cards:
    """Figures that matter, as (name, text)."""

    items: Sequence[tuple[str, str]]
    kind: str = "cards"


@dataclass(frozen=True)
class Gallery:
    """Figures side by side, as many a row as fit; with a title they are shown on demand."""

    figures: Sequence[Figure]
    title: str | None = None
    kind: str = "gallery"


Block: TypeAlias = "Figure | Table | Text | Code | Cards | Gallery"


@dataclass
class Section:
    """A section of the page: an id for links, a title, and its blocks."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)


def number(value: float | None) -> str:
    """Four significant digits, or a dash."""
    return "–" if value is None else f"{value:.4g}"


FORMATS: dict[str, Callable[[Any], str]] = {
    "text": lambda value: "–" if value is None else str(value),
    "code": lambda value: "–" if value is None else str(value),
    "number": number,
    "integer": lambda value: "–" if value is None else f"{value:,.0f}",
    "percent": lambda value: "–" if value is None else f"{100 * value:.2f} %",
    "seconds": lambda value: "–" if value is None else f"{value:.1f}",
    "milliseconds": lambda value: "–" if value is None else f"{1000 * value:.1f}",
    "megabytes": lambda value: "–" if value is None else f"{value / 1e6:.1f}",
    "times": lambda value: "–" if value is None else f"{value:.2f}",
}
"""How a column shows its values."""


def _key(value: Any) -> str:
    """What a cell is sorted by: a number in full, or the text."""
    return "" if value is None else repr(value) if isinstance(value, (int, float)) else str(value)


def drawn(plot: Plot, caption: str, alt: str, wide: bool = False) -> Figure:
    """A matplotlib figure as inline SVG in the page's colours.

    Args:
        plot: made within `plot_style`.
        caption: what one sees and how to read it.
        alt: the same for those who cannot see it, in one sentence.
        wide: as in `Figure`.
    """
    buffer = io.StringIO()
    with plot_style():
        plot.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)  # HTML knows them, and the page is to hold no URL
    prefix = hashlib.sha256(text.encode()).hexdigest()[:8]  # ids are unique in the page
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{prefix}-", text)
    text = text.replace(INK, "currentColor")
    width, height = (float(value) for value in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    head = f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {width:g} {height:g}" style="width:{width:g}pt">'
    return Figure(Markup(head + text[text.index(">") + 1 :]), caption, wide)  # noqa: S704 - matplotlib escapes its texts


def png(content: bytes, caption: str, alt: str, wide: bool = False) -> Figure:
    """A PNG file, embedded.

    Args:
        content: bytes of the file.
        caption: text below it.
        alt: text for readers who do not see it.
        wide: whether it takes the whole width.

    Raises:
        ValueError: it is no PNG file.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.load()
            width, height = picture.size
    except (OSError, SyntaxError) as error:
        raise ValueError(f"no PNG picture: {error}") from error
    data = base64.b64encode(content).decode()
    template = Markup('<img src="data:image/png;base64,{}" alt="{}" width="{}" height="{}">')
    return Figure(template.format(data, alt, width, height), caption, wide)


@lru_cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_file("page.html.j2"))


def _file(name: str) -> str:
    """A file of this package."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as HTML; it may load nothing, and runs the one script that it holds.

    Args:
        title: heading of the page.
        subtitle: line below it.
        sections: in their order.
    """
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        style=Markup(_file("page.css")),  # noqa: S704 - of this package
        script=Markup(script),  # noqa: S704 - of this package
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )
