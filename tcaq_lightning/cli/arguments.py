"""Command-line arguments: options named like the keys of dataclasses, whole and exact."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass
from typing import Any

from tcaq_lightning.config.keys import keys_of, section_of, type_name
from tcaq_lightning.config.values import Raw, build, convert, merged, typed
from tcaq_lightning.errors import UserError


@dataclass(frozen=True)
class Option:
    """One thing that can be given on the command line.

    Attributes:
        name: of the option without dashes: a parameter's name, or a dotted key.
        hint: its type.
        default: its value where it is not given, `dataclasses.MISSING` if it has to be given.
        doc: what it is.
        positional: whether it is given by its place; a list takes all values that are left.
    """

    name: str
    hint: Any
    default: Any = MISSING
    doc: str = ""
    positional: bool = False


CONFIG = Option("config", str, None, "YAML file of keys that differ; of several, later ones override earlier ones")
"""The option that may be given several times."""


@dataclass(frozen=True)
class Given:
    """What a command line gives.

    Attributes:
        values: texts by option, nested at the dots of the names.
        configs: files of `--config`, in their order.
    """

    values: dict[str, Any]
    configs: list[str]


def options_of(kind: type, prefix: str = "", defaults: Any = None) -> Iterator[Option]:
    """An option for every key of a dataclass, and for those of the dataclasses within it.

    Args:
        kind: the dataclass.
        prefix: where it stands, with a dot at the end.
        defaults: an instance whose values are the defaults; None takes the dataclass's own.
    """
    for key in keys_of(kind):
        name, default = f"{prefix}{key.name}", key.default if defaults is None else getattr(defaults, key.name)
        yield Option(name, key.hint, default, key.doc)
        if key.section is not None:
            yield from options_of(key.section, f"{name}.", default)


def options_of_call(function: Callable[..., Any], docs: Mapping[str, str]) -> Iterator[Option]:
    """An option for every parameter of a function; one that is a dataclass has an option for every key.

    Args:
        function: parameters without a default are given by place.
        docs: what the parameters are.
    """
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        section, missing = section_of(hints[name]), parameter.default is parameter.empty
        default = MISSING if missing else parameter.default
        yield Option(name, hints[name], default, docs.get(name, ""), missing and section is None)
        if section is not None:
            yield from options_of(section, f"{name}.", None if missing else default)


def read(arguments: Sequence[str], options: Sequence[Option], short: bool = False) -> Given:
    """Sort a command line's arguments by option.

    Args:
        arguments: `--name value`, `--name=value`, a bare `--name` for true, or values by place.
        options: what there is.
        short: whether a key's last name alone will do where only one key has it.

    Raises:
        UserError: an unknown option, one without a value, or too many values.
    """
    places = [o for o in options if o.positional]
    given, waiting = Given({}, []), list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--"):
            if not places:
                raise UserError(f"unexpected argument {argument!r}; expected --name value")
            if typing.get_origin(places[0].hint) is list:
                given.values.setdefault(places[0].name, []).append(Raw(argument))
            else:
                _put(given.values, places.pop(0).name, Raw(argument))
            continue
        name, joined, text = argument.removeprefix("--").partition("=")
        option, whole = _find(name, options, short)
        if not joined:
            if waiting and not waiting[0].startswith("--"):
                text = waiting.pop(0)
            elif option.hint is bool:
                text = "true"
            else:
                raise UserError(f"--{name}: expected a value, got none")
        if option is CONFIG:
            given.configs.append(text)
        else:
            _put(given.values, whole, Raw(text))
    return given


def called_with(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a function from the command line's texts.

    Raises:
        UserError: a value that is missing, of another type or out of range.
    """
    hints, made = typing.get_type_hints(function), {}
    for name, parameter in inspect.signature(function).parameters.items():
        section = section_of(hints[name])
        if section is not None:
            below = {} if parameter.default in (parameter.empty, None) else asdict(parameter.default)
            made[name] = build(section, merged(below, typed(section, given.get(name, {}), name)), name)
        elif name in given:
            made[name] = convert(given[name], hints[name], f"--{name}")
        elif parameter.default is parameter.empty:
            raise UserError(f"{name} is missing; expected {type_name(hints[name])}, see --help")
    return made


def _find(name: str, options: Sequence[Option], short: bool) -> tuple[Option, str]:
    """The option of a name, and its whole name; an option that holds a mapping has a name for each of its keys."""
    exact = [(o, name) for o in options if name == o.name or (_is_mapping(o) and name.startswith(f"{o.name}."))]
    if exact:
        return exact[0]
    if short:
        ends = [(o, whole) for o in options for whole in _whole_names(name, o)]
        if len(ends) == 1:
            return ends[0]
        if ends:
            raise UserError(f"--{name} can mean {' or '.join(f'--{whole}' for _, whole in ends)}; give one of these")
    names = {o.name for o in options} | ({o.name.rpartition(".")[2] for o in options} if short else set())
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
    hint = f"; expected one such as --{near[0]}" if near else ""
    raise UserError(f"unknown option --{name}{hint}, see --help")


def _whole_names(name: str, option: Option) -> list[str]:
    """What the name, the end of an option's, can stand for; of a mapping also with a key of it."""
    if option.name.endswith(f".{name}"):
        return [option.name]
    parts = name.split(".")
    heads = range(1, len(parts)) if _is_mapping(option) else ()
    return [".".join([option.name, *parts[i:]]) for i in heads if option.name.endswith(f".{'.'.join(parts[:i])}")]


def _is_mapping(option: Option) -> bool:
    return typing.get_origin(option.hint) is dict


def _put(values: dict[str, Any], name: str, value: Raw) -> None:
    """Enter a value under a dotted name; a mapping given as text before it is overridden."""
    *outer, last = name.split(".")
    for part in outer:
        below = values.get(part)
        values[part] = below if isinstance(below, dict) else {}
        values = values[part]
    values[last] = value
