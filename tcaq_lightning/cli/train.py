"""The command line of train.py: configs laid over each other, and options for single keys."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcaq_lightning.cli.arguments import CONFIG, Option, options_of, read
from tcaq_lightning.cli.help import asks_for_help, show_help
from tcaq_lightning.config import Config
from tcaq_lightning.config.plain_yaml import read_yaml
from tcaq_lightning.config.values import build, merged, typed
from tcaq_lightning.errors import UserError

PROGRAM = "train.py"
ABOUT = "Quantize a diffusion model: calibrate on its own samples, write an integer artifact, show what it cost."
EXAMPLE = "python train.py --config configs/quickstart.yaml --quantization.weight.bits 6 --run_dir runs/w6"
DRY_RUN = Option("dry_run", bool, False, "print the plan and what becomes of every layer, and stop")


def parse_config(argv: Sequence[str] | None = None) -> tuple[Config, bool]:
    """Read `--config FILE`, which may be given several times, `--any.key VALUE` and `--dry_run`.

    Defaults are overridden by the first file, that by the second one, and all files by the options. Nested keys are
    merged, lists are replaced.

    Args:
        argv: arguments, or None for the process's own.

    Returns:
        The configuration, and whether only the plan is wanted.

    Raises:
        UserError: unknown or mistyped keys, values out of range, an unreadable file.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = [CONFIG, DRY_RUN, *options_of(Config)]
    if asks_for_help(arguments):
        show_help(PROGRAM, ABOUT, EXAMPLE, options, arguments)
    given = read(arguments, options)
    dry_run = given.values.pop("dry_run", "false")
    layers = [config_file(Path(path), f"--config {path}") for path in given.configs]
    return build(Config, merged(*layers, typed(Config, given.values))), dry_run == "true"


def config_file(path: Path, where: str) -> dict[str, Any]:
    """A config file's values, nested as in the file, their names and types checked.

    Args:
        path: YAML file.
        where: it was given, for messages.

    Raises:
        UserError: unknown or mistyped keys, or an unreadable file.
    """
    try:
        return typed(Config, read_yaml(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error}); expected a YAML file") from error
    except ValueError as error:
        raise UserError(f"{where}: no valid YAML: {error}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
