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
        positional: whether it is given by its place.
    """

    name: str
    hint: Any
    default: Any = MISSING
    doc: str = ""
    positional: bool = False


@dataclass(frozen=True)
class Given:
    """What a command line gives.

    Attributes:
        values: texts by option, nested at the dots of the names.
        configs: files of `--config`, in their order.
    """

    values: dict[str, Any]
    configs: list[str]


def options_of(kind: type, prefix: str = "") -> Iterator[Option]:
    """An option for every key of a dataclass, and for those of the dataclasses within it."""
    for key in keys_of(kind):
        name = f"{prefix}{key.name}"
        yield Option(name, key.hint, key.default, key.doc)
        if key.section is not None:
            yield from options_of(key.section, f"{name}.")


def options_of_call(function: Callable[..., Any], docs: Mapping[str, str]) -> Iterator[Option]:
    """An option for every parameter of a function; one that is a dataclass has an option for every key.

    Args:
        function: parameters without a default are given by place.
        docs: what the parameters are.
    """
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is parameter.empty
        default = MISSING if required else parameter.default
        yield Option(name, hints[name], default, docs.get(name, ""), required)
        section = section_of(hints[name])
        if section is not None:
            yield from options_of(section, f"{name}.")


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
            _put(given.values, places.pop(0).name, Raw(argument))
            continue
        name, joined, text = argument.removeprefix("--").partition("=")
        option = None if name == "config" else _find(name, options, short)
        if not joined:
            if waiting and not waiting[0].startswith("--"):
                text = waiting.pop(0)
            elif option is not None and option.hint is bool:
                text = "true"
            else:
                raise UserError(f"--{name}: expected a value, got none")
        if option is None:
            given.configs.append(text)
        else:
            _put(given.values, _whole_name(name, option), Raw(text))
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


def _find(name: str, options: Sequence[Option], short: bool) -> Option:
    """The option of a name; one that holds a mapping has a name for each of its keys."""
    for option in options:
        if option.name == name or (typing.get_origin(option.hint) is dict and name.startswith(f"{option.name}.")):
            return option
    if short:
        ends = [o for o in options if o.name.rpartition(".")[2] == name]
        if len(ends) == 1:
            return ends[0]
        if ends:
            raise UserError(f"--{name} can mean {' or '.join(f'--{o.name}' for o in ends)}; give one of these")
    names = {o.name: o for o in options} | ({o.name.rpartition(".")[2]: o for o in options} if short else {})
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; expected one such as --{near[0]}" if near else ""
    raise UserError(f"unknown option --{name}{hint}, see --help")


def _whole_name(name: str, option: Option) -> str:
    return name if name.startswith(f"{option.name}.") else option.name


def _put(values: dict[str, Any], name: str, value: Raw) -> None:
    """Enter a value under a dotted name; a mapping given as text before it is overridden."""
    *outer, last = name.split(".")
    for part in outer:
        below = values.get(part)
        values[part] = below if isinstance(below, dict) else {}
        values = values[part]
    values[last] = value
