"""What commands have in common: checks of options, and a bar on the console."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tcaq_lightning.config.checks import require, require_count, require_threads
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.distributed.collectives import is_main


def at_least(least: int, most: int = 10**9, /, **values: int | None) -> None:
    """Check that options are large enough and not absurd, or not given.

    Args:
        least: the smallest value.
        most: the largest one.
        values: of the options, by name.

    Raises:
        UserError: one is smaller or larger.
    """
    for name, value in values.items():
        require_count(value, f"--{name}", least, most)


def check_seed(seed: int) -> None:
    """Check that a seed has noises of its own: of larger seeds, torch uses only the lower 32 bits.

    Raises:
        UserError: it is not.
    """
    require(0 <= seed < 2**31, "--seed", "in 0 .. 2^31 - 1", seed)


def check_writable(file: Path) -> None:
    """Check before the work that its result can be written; the file's directory is created.

    Raises:
        UserError: it cannot.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--output: expected a file that can be written, got {file}; choose another path")


def set_threads(threads: int | None) -> None:
    """Set the number of PyTorch's CPU threads; None leaves PyTorch's choice.

    Raises:
        UserError: this machine has far fewer.
    """
    require_threads(threads, "--threads")
    if threads is not None:
        torch.set_num_threads(threads)


def plain_console(**settings: Any) -> Console:
    """A console that prints texts as they are: names and paths of users may look like markup or emoji.

    Args:
        settings: further ones of rich's `Console`.
    """
    return Console(log_path=False, markup=False, emoji=False, **settings)


@dataclass
class Advance:
    """What moves a bar.

    Attributes:
        by: moves it by a number of samples.
        to: moves it to a position, of a total that becomes known only then.
    """

    by: Callable[[int], None]
    to: Callable[[int, int], None]

    def __call__(self, count: int) -> None:
        """Move by a number of samples."""
        self.by(count)


@contextmanager
def progress_bar(total: int, what: str = "samples") -> Iterator[Advance]:
    """Show a bar on stderr, on a terminal and in the first process only; yields what moves it.

    Args:
        total: number of what is done.
        what: its name.
    """
    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = plain_console(stderr=True)
    with Progress(*columns, console=console, disable=not (console.is_terminal and is_main())) as progress:
        task = progress.add_task(what, total=total)
        yield Advance(
            by=lambda count: progress.advance(task, count),
            to=lambda done, of: progress.update(task, completed=done, total=of),
        )
