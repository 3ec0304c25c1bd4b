"""YAML as users mean it: no key twice, no number or switch that versions of YAML read differently, bounded in size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

LARGEST = 1_000_000
"""Bytes of a file."""
MOST_NODES = 10_000
"""Values of a file, those behind an alias counted wherever it stands."""
DEEPEST = 40
"""Levels of a file."""
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
"""Words that are true or false in YAML 1.1 and texts in YAML 1.2."""

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_NUMBER = re.compile(
    r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,4})?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_UNCLEAR = re.compile(r"[-+]?(0[0-9_]|0[xob]|[0-9][0-9_]*_|[0-9]+:[0-5]?[0-9])[0-9a-fA-F_:.]*|[-+]?[0-9]{20,}")
_INFINITE = re.compile(r"\.(inf|nan)")
_NULL, _BOOLEAN = re.compile(r"~|null|Null|NULL|"), re.compile(r"true|True|TRUE|false|False|FALSE")


class Unclear(str):
    """A word without quotes that versions of YAML read differently, such as `no`, `017` or `1_000`: a text alone."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the library's own attribute

    def construct_plain(self, node: yaml.ScalarNode) -> Any:
        """A word without quotes."""
        text = node.value
        if text.lower() in SWITCHES or _UNCLEAR.fullmatch(text):
            return Unclear(text)
        if _INTEGER.fullmatch(text):
            return int(text)
        if _NUMBER.fullmatch(text):
            return float(_INFINITE.sub(r"\1", text.lower()))
        return text


def _add(kind: str, pattern: re.Pattern[str]) -> None:
    _Loader.add_implicit_resolver(f"{_TAG}{kind}", pattern, None)


_add("null", re.compile(rf"^({_NULL.pattern})$"))
_add("bool", re.compile(rf"^({_BOOLEAN.pattern})$"))
_add("merge", re.compile(r"^(<<)$"))
_add("plain", re.compile(r"^[-+.0-9].*$|^(" + "|".join(SWITCHES) + r")$", re.IGNORECASE))
_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "str", "seq", "map")
} | {f"{_TAG}plain": _Loader.construct_plain}


def parse_yaml(text: str) -> Any:
    """What a YAML text says: mappings, lists, texts, numbers, true, false and null.

    Words that versions of YAML read differently are `Unclear`.

    Raises:
        ValueError: it is no YAML, too large or deep, refers to itself, or has a key twice.

    >>> parse_yaml("{a: [1, 1e-3, no], b: 'no'}")
    {'a': [1, 0.001, 'no'], 'b': 'no'}
    """
    if len(text) > LARGEST:
        raise ValueError(f"more than {LARGEST} characters")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node, {}, DEEPEST)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError(f"more than {DEEPEST} levels") from error


def read_yaml(path: Path) -> Any:
    """What a file says, as `parse_yaml`.

    Raises:
        OSError: it cannot be read.
        ValueError: as in `parse_yaml`, or it is not UTF-8.
    """
    with path.open("rb") as stream:  # some files, such as devices, have no end
        content = stream.read(LARGEST + 1)
    return parse_yaml(content.decode("utf-8"))


def _measure(node: yaml.Node, known: dict[int, int], levels: int) -> int:
    """Number of values under a node.

    Args:
        node: of a file that may hold aliases.
        known: numbers by node; 0 while a node is counted.
        levels: how many more there may be.

    Raises:
        ValueError: too many values or levels, or a node that is within itself.
    """
    if levels == 0:
        raise ValueError(f"more than {DEEPEST} levels")
    if isinstance(node, yaml.ScalarNode):
        return 1
    if (found := known.get(id(node))) is not None:
        if not found:
            raise ValueError("an alias that refers to itself")
        return found
    known[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    count = 1
    for part in parts:
        count += _measure(part, known, levels - 1)
        if count > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES} values, those behind aliases counted wherever they stand")
    known[id(node)] = count
    return count


def _check_keys(node: yaml.MappingNode) -> None:
    """Check that no key hides another one."""
    seen: set[str] = set()
    for key, _ in node.value:
        where = f"line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"expected a word as a key in {where}")
        if key.value in seen:
            raise ValueError(f"the key {key.value} is there twice, again in {where}")
        seen.add(key.value)
