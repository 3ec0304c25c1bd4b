"""Command lines from dataclasses and functions: typed values, or one line that says what is wrong."""

from tcaq_lightning.cli.commands import run_command
from tcaq_lightning.cli.train import parse_config

__all__ = ["parse_config", "run_command"]
