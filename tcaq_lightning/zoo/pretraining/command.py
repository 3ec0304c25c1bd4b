"""What the training commands have in common."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable

from jsonargparse import auto_cli

from tcaq_lightning.runtime.exit_codes import run_cli

_EXPECTED_WARNINGS = (
    ".*exists and is not empty",  # that is how a run is resumed
    ".*your dataloader is not resumable",  # its only content is the number of steps
    ".*does not have many workers",
    ".*isinstance.treespec, LeafSpec",
    ".*module.s. in eval mode at the start of training",  # a frozen feature extractor
)


def run(function: Callable[..., None]) -> None:
    """Run a function as a command: its arguments are the options, and exit codes are those of all commands.

    Args:
        function: typed and documented; parameters without a default are required options.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    sys.exit(run_cli(lambda: auto_cli(function, as_positional=False)))
