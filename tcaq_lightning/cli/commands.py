"""Commands: functions whose parameters are the options."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from tcaq_lightning.cli.arguments import called_with, options_of_call, read
from tcaq_lightning.cli.help import WIDTH, Description, asks_for_help, show_help
from tcaq_lightning.errors import UserError


def run_command(table: Mapping[str, tuple[str, str]], arguments: Sequence[str], program: str, example: str) -> None:
    """Run one of several commands.

    Args:
        table: by name, the command's function as `module:function`, and what it does.
        arguments: the command's name and its options.
        program: how the commands are called.
        example: one command line, for `--help`.

    Raises:
        UserError: an unknown command, or options that it does not take.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        if arguments:
            sys.stdout.write(overview(table, program, example))
            return
        raise UserError(f"expected a subcommand, one of {', '.join(table)}, see {program} --help")
    name, *rest = arguments
    if name not in table:
        raise UserError(f"unknown subcommand {name!r}; expected one of {', '.join(table)}, see {program} --help")
    function = command_function(table, name)
    description = Description.of(function)
    options = list(options_of_call(function, description.docs))
    if asks_for_help(rest):
        show_help(f"{program} {name}", description.about, description.example, options, rest)
    function(**called_with(function, read(rest, options, short=True).values))


def command_function(table: Mapping[str, tuple[str, str]], name: str) -> Callable[..., Any]:
    """The function of a command, whose module is imported now."""
    module, _, attribute = table[name][0].partition(":")
    function: Callable[..., Any] = getattr(import_module(module), attribute)
    return function


def overview(table: Mapping[str, tuple[str, str]], program: str, example: str) -> str:
    """What there is, a line for each command.

    Args:
        table: module and summary of each command, by name.
        program: name of the program.
        example: a command line.
    """
    lines = [f"usage: {program} COMMAND [options]", ""]
    for name, (_, about) in table.items():
        lines += textwrap.wrap(about, WIDTH, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14)
    lines += ["", f"options of a command: {program} COMMAND --help", "", "example:", f"  {example}"]
    return "\n".join(lines) + "\n"
