"""Dataclasses from plain values, such as those of YAML, with a check of every type and every name."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from tcaq_lightning.config.keys import keys_of, section_of, shown, type_name
from tcaq_lightning.config.plain_yaml import SWITCHES, Unclear, parse_yaml
from tcaq_lightning.errors import UserError

T = TypeVar("T")


class Raw(str):
    """A value as the command line gives it: text that means what its key's type says."""

    __slots__ = ()


def from_values(kind: type[T], values: Mapping[str, Any], key: str = "") -> T:
    """Make a dataclass, and those within it, from nested values; keys that are left out have their defaults.

    Args:
        kind: the dataclass.
        values: by key, as YAML has them.
        key: where the dataclass stands, for messages; empty for the whole configuration.

    Raises:
        UserError: an unknown key, a value of another type or out of range; the message names the whole key.

    >>> from tcaq_lightning.config import Config
    >>> from_values(Config, {"quantization": {"weight": {"bits": 6}}}).quantization.weight.bits
    6
    """
    made: T = build(kind, typed(kind, values, key), key)
    return made


def typed(kind: Any, values: Any, key: str = "") -> dict[str, Any]:
    """Some values of a dataclass with their types checked; nested dataclasses stay nested values.

    Args:
        kind: the dataclass.
        values: nested values, as YAML has them.
        key: where the dataclass stands, for messages.

    Raises:
        UserError: as in `from_values`.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{key or 'the file'} must hold keys and values, got {_shortened(_text(values))}")
    known = {k.name: k.hint for k in keys_of(kind)}
    found = {}
    for name, value in values.items():
        whole = f"{key}.{name}" if key else str(name)
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f", such as {near[0]}" if near else ""
            raise UserError(f"unknown key {whole}; expected one of {', '.join(known)}{hint}")
        found[name] = convert(value, known[name], whole)
    return found


def check_types(made: Any, key: str) -> None:
    """Check that the fields of a dataclass that was made in Python have their types.

    Args:
        made: the dataclass, with those within it; those in lists are checked when they are made.
        key: what stands before its fields' names in messages; empty for the whole configuration.

    Raises:
        UserError: a field has not.
    """
    kind: Any = type(made)
    for field in keys_of(kind):
        value, whole = getattr(made, field.name), f"{key}.{field.name}" if key else field.name
        nested = value if isinstance(value, (list, tuple)) else [value]
        if field.section is not None and value is not None and not isinstance(value, field.section):
            raise UserError(f"{whole} must be a {field.section.__name__}, got {_shortened(_text(value))}")
        if field.section is not None and value is not None:
            check_types(value, whole)
        elif not any(dataclasses.is_dataclass(part) for part in nested):
            convert(value, field.hint, whole)


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of several layers; later ones override earlier ones key by key, lists as a whole.

    >>> merged({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}})
    {'a': {'b': 1, 'c': [2]}}
    """
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            below = result.get(name)
            both = isinstance(below, Mapping) and isinstance(value, Mapping)
            result[name] = merged(below or {}, value) if both or isinstance(value, Mapping) else value
    return result


def build(kind: Any, values: Mapping[str, Any], key: str = "") -> Any:
    """A dataclass from values that `typed` has checked, with its defaults for the others.

    Args:
        kind: the dataclass.
        values: as `typed` returns them.
        key: where the dataclass stands, for messages.

    Raises:
        UserError: a value is out of range, or missing.
    """
    made = {}
    for k in keys_of(kind):
        whole = f"{key}.{k.name}" if key else k.name
        if k.name in values:
            made[k.name] = _built(values[k.name], k.hint, whole)
        elif k.default is dataclasses.MISSING:
            raise UserError(f"{whole} is missing; expected {type_name(k.hint)}")
    stands_anywhere = "place" in inspect.signature(kind).parameters
    return kind(**made, place=key) if stands_anywhere and key else kind(**made)


def _built(value: Any, hint: Any, key: str) -> Any:
    section = section_of(hint)
    if section is not None and isinstance(value, Mapping):
        return build(section, value, key)
    if typing.get_origin(hint) is list and isinstance(value, list):
        inner = typing.get_args(hint)[0]
        return [_built(x, inner, f"{key}[{i}]") for i, x in enumerate(value)]
    return value


def convert(value: Any, hint: Any, key: str) -> Any:
    """A value as its type wants it; dataclasses become checked nested values.

    Args:
        value: plain, or `Raw` text.
        hint: the type.
        key: whole key, for messages.

    Raises:
        UserError: the value is not of that type.
    """
    section, origin, inner = section_of(hint), typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Raw) and not _takes_text(hint):
        value = _parsed(value, key)
        if isinstance(value, (int, float)) and _takes_list(hint):
            value = [value]
    if value is None and type(None) in inner:
        return None
    if section is not None:
        return typed(section, value, key)
    if hint is Any:
        return _plain(value, key)
    if origin is list:
        return _listed(value, inner[0], key)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _mistaken(value, hint, key)
        return {str(name): convert(item, inner[1], f"{key}.{name}") for name, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, inner, hint, key)
    if origin is Literal:
        plain = str(value) if isinstance(value, Raw) else value
        if not any(plain == choice and type(plain) is type(choice) for choice in inner):
            raise _mistaken(value, hint, key)
        return plain
    return _scalar(value, hint, key)


def _scalar(value: Any, kind: type, key: str) -> Any:
    if kind in (Path, str) and isinstance(value, (str, kind)):
        return kind(value)
    if kind is bool and isinstance(value, Unclear) and value.lower() in SWITCHES:
        return SWITCHES[value.lower()]
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    raise _mistaken(value, kind, key)


def _plain(value: Any, key: str) -> Any:
    """A value of any type that JSON has, too."""
    if isinstance(value, Unclear):
        raise UserError(
            f"{key}: versions of YAML read {value} differently; write true or false, a decimal number without leading "
            "zeros, or a text in quotes"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} must be finite, got {value}")
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    return str(value) if isinstance(value, Raw) else value


def _listed(value: Any, inner: Any, key: str) -> list[Any]:
    """A list; of the command line also `a,b`, or one element."""
    if isinstance(value, Raw):
        value = [Raw(part.strip()) for part in value.split(",")]
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _mistaken(value, list[inner], key)
    return [convert(x, inner, f"{key}[{i}]") for i, x in enumerate(value)]


def _one_of(value: Any, hints: Sequence[Any], whole: Any, key: str) -> Any:
    if isinstance(value, Raw) and value in ("null", "~") and type(None) in hints:
        return None
    for hint in hints:
        if hint is type(None):
            continue
        try:
            return convert(value, hint, key)
        except UserError:
            if len(hints) == 2 and type(None) in hints and typing.get_origin(hint) is not None:
                raise
    raise _mistaken(value, whole, key)


def _takes_text(hint: Any) -> bool:
    """Whether a type wants the command line's text as it is."""
    inner = typing.get_args(hint)
    if hint in (str, Path):
        return True
    if typing.get_origin(hint) is Literal:
        return all(isinstance(choice, str) for choice in inner)
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and any(_takes_text(t) for t in inner)


def _takes_list(hint: Any) -> bool:
    """Whether a type is a list, or a list or null."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return all(kind is type(None) or typing.get_origin(kind) is list for kind in kinds)


def _parsed(value: Raw, key: str) -> Any:
    """What the text means in YAML; a text that stays one remains the command line's."""
    try:
        found = parse_yaml(value)
    except ValueError as error:
        raise UserError(f"{key}: no valid YAML: {_shortened(repr(str(value)))}: {error}") from error
    return Raw(found) if type(found) is str else found


def _mistaken(value: Any, hint: Any, key: str) -> UserError:
    unclear = isinstance(value, Unclear) and not _takes_text(hint)
    hint_ = " in decimal digits, without leading zeros, prefixes or underscores" if unclear and hint is not bool else ""
    return UserError(f"{key} must be {type_name(hint)}{hint_}, got {_shortened(_text(value))}")


def _text(value: Any) -> str:
    """A value in one line, as YAML writes it if it can."""
    got = str(value) if isinstance(value, (Raw, Unclear)) else value
    try:
        return shown(got)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return repr(got)


def _shortened(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
