from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tcaq_lightning.reports.html import charts
from tcaq_lightning.reports.html.page import (
    Cards,
    Code,
    Column,
    Gallery,
    Section,
    Table,
    Text,
    drawn,
    note,
    number,
    plot_style,
    png,
    render,
)

HOSTILE = "<script>alert('1')</script><img src=x onerror=\"alert(2)\"> & $x^2$ {{ 7*7 }} </style> \\frac"


def plot(label: str = "layer") -> Any:
    with plot_style():
        return charts.bars([label, "other"], [1.0, 2.0], "x")


def everything(text: str) -> list[Section]:
    figure = drawn(plot(text), text, text)
    table = Table(text, [Column(text), Column(text, "code"), Column("n", "number")], [(text, text, 0.1)])
    folded = Table(text, table.columns, table.rows, folded=True)
    blocks = [Text(text), note(text), Code(text, text), Cards([(text, text)]), figure, table, folded]
    return [Section("one", text, [*blocks, Gallery([figure], text), Gallery([figure])])]


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 2)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_hostile_text_stays_text(parse: Callable[[str], Any]) -> None:
    page = parse(render(HOSTILE, HOSTILE, everything(HOSTILE)))
    (script,) = page.all("script")
    assert "alert" not in script.text
    assert page.all("img") == []
    assert not any(name.startswith("on") for element in page for name in element.attributes)
    assert page.all("h1")[0].text == HOSTILE
    assert [p.text for p in page.all("section")[0].all("p")] == [HOSTILE, HOSTILE]
    assert page.all("pre")[0].text == HOSTILE
    assert page.all("dd")[0].text == page.all("dt")[0].text == HOSTILE
    assert {f.text for f in page.all("figcaption")} == {HOSTILE}
    assert page.all("svg")[0].attributes["aria-label"] == HOSTILE
    cells = page.all("td")[:3]
    assert [c.text for c in cells] == [HOSTILE, HOSTILE, "0.1"]
    assert cells[0].attributes["data-value"] == HOSTILE


# A parser turns other line ends and NUL into what HTML knows, so that texts with them do not come back as they were.
@given(st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"])))
@settings(max_examples=30, deadline=None)
def test_any_text_comes_back_from_the_page(parse: Callable[[str], Any], text: str) -> None:
    table = Table(text, [Column(text)], [(text,)])
    page = parse(render(text, text, [Section("s", text, [Text(text), table])]))
    cell = page.all("td")[0]
    assert cell.text == cell.attributes["data-value"] == text
    assert page.all("section")[0].all("p")[0].text == text


def test_plots_take_the_page_s_colours_and_hold_no_url(parse: Callable[[str], Any]) -> None:
    text = render("t", "s", [Section("a", "A", [drawn(plot(), "c", "alt"), drawn(plot("another"), "c", "alt")])])
    assert "currentColor" in text
    assert "#010203" not in text
    assert "://" not in text
    page = parse(text)
    ids = [e.attributes["id"] for e in page if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    svg = page.all("svg")[0]
    assert {"layer", "other", "x"} <= {t.text for t in svg.all("text")}
    used = [e.attributes["xlink:href"] for e in page if "xlink:href" in e.attributes]
    used += re.findall(r"url\((#[^)]+)\)", text)
    assert used
    assert {u.removeprefix("#") for u in used} <= set(ids)


def test_the_same_page_has_the_same_bytes() -> None:
    assert render("t", "s", everything("x")) == render("t", "s", everything("x"))


def test_labels_of_any_kind_can_be_drawn() -> None:
    for label in ("$", "$a$", "a\nb", "\x00", "x" * 500, "%s", "\\"):
        drawn(plot(charts.plain(label)), "", "")


def test_pictures_are_embedded_and_others_refused(parse: Callable[[str], Any]) -> None:
    page = parse(render("t", "s", [Section("a", "A", [png(picture(), 'cap"tion', '"alt')])]))
    (image,) = page.all("img")
    assert image.attributes["src"].startswith("data:image/png;base64,")
    assert (image.attributes["alt"], image.attributes["width"], image.attributes["height"]) == ('"alt', "3", "2")
    for content in (b"", b"<svg onload=alert(1)>", picture()[:40]):
        with pytest.raises(ValueError, match="no PNG"):
            png(content, "", "")


def test_the_script_is_the_one_that_the_policy_admits(parse: Callable[[str], Any]) -> None:
    import base64
    import hashlib

    page = parse(render("t", "s", []))
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    digest = base64.b64encode(hashlib.sha256(page.all("script")[0].text.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy.attributes["content"]
    assert policy.attributes["content"].startswith("default-src 'none'")


def test_numbers_and_what_is_missing() -> None:
    table = Table(
        "", [Column("a", "number"), Column("b", "percent"), Column("c")], [(1 / 3, 0.5, None), (None, None, "x")]
    )
    assert table.cells() == [
        [("number", "0.3333333333333333", "0.3333"), ("number", "0.5", "50.00 %"), ("", "", "–")],
        [("number", "", "–"), ("number", "", "–"), ("", "x", "x")],
    ]
    assert number(None) == "–"
