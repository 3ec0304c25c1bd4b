"""YAML means what a user expects, or is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.config.plain_yaml import LARGEST, Unclear, parse_yaml, read_yaml

TEXTS = st.text().map("t{}".format)  # others may look like numbers in one of YAML's versions
PLAIN = st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | TEXTS


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("+5", 5),
        ("1e-3", 1e-3),
        ("1.5E+3", 1500.0),
        (".inf", float("inf")),
        ("True", True),
        ("~", None),
        ("", None),
        ("2026-12-01", "2026-12-01"),
        ("y", "y"),
        ("'017'", "017"),
        ("a: &b {c: 1}\nd: {<<: *b}", {"a": {"c": 1}, "d": {"c": 1}}),
        ("{<<: {a: 1}, a: 2}", {"a": 2}),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["017", "0x1F", "0b11", "0o17", "1_000", "1:30", "yes", "No", "ON", "off", "9" * 30])
def test_what_versions_of_yaml_read_differently_stays_a_word(text: str) -> None:
    found = parse_yaml(text)
    assert isinstance(found, Unclear)
    assert found == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{a: 1, a: 2}", "the key a is there twice"),
        ("b: {a: 1, 'a': 2}", "the key a is there twice"),
        ("&a [*a]", "refers to itself"),
        ("a: &a {b: {c: *a}}", "refers to itself"),
        ("!!python/object/apply:os.system [ls]", "constructor"),
        ("!!int '017'", "constructor"),
        ("!!binary aGVsbG8=", "constructor"),
        ("? [1]\n: 2", "a word as a key"),
        ("[" * 5_000 + "]" * 5_000, "levels"),
        ("- " * 5_000, "levels"),
        ("{a: " * 100 + "1" + "}" * 100, "levels"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 30)), "values"),
        ("[" + "1," * 20_000 + "]", "values"),
        ("a: \x00", "special characters"),
        ("a: 1\n---\nb: 2", "single document"),
        ("x" * (LARGEST + 1), "characters"),
    ],
)
def test_refused_in_bounded_time(text: str, words: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)
    assert time.perf_counter() - began < 5


def test_a_file_without_an_end() -> None:
    with pytest.raises(ValueError, match="characters"):
        read_yaml(Path("/dev/zero"))


@given(st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4)))
def test_what_was_dumped_is_read_again(value: Any) -> None:
    try:
        text = yaml.safe_dump(value)
        yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeEncodeError):  # lone surrogates
        return
    assert parse_yaml(text) == value


@given(st.text(max_size=60) | st.text(alphabet="{}[]:,-&*!?<>|'\"# \n\tab01.", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    found = ""
    try:
        parse_yaml(text)
    except ValueError as error:
        found = str(error)
    assert "\n" not in found
