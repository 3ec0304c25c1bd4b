"""Commands on models, finished runs and images: `python -m tcaq_lightning COMMAND`."""

from __future__ import annotations

import re
import sys

from tcaq_lightning.cli import run_command
from tcaq_lightning.runtime.exit_codes import run_cli

PROGRAM = "python -m tcaq_lightning"
EXAMPLE = f"{PROGRAM} sample runs/quickstart/quantized --num 64 --output grid.png"
COMMANDS = {
    "sample": ("tcaq_lightning.evaluation.command:sample", "sample images and write them as one PNG"),
    "evaluate": ("tcaq_lightning.reports.command:evaluate", "measure FID and other metrics of a model or of images"),
    "statistics": ("tcaq_lightning.evaluation.command:statistics", "compute what evaluate --reference compares with"),
    "report": ("tcaq_lightning.reports.html.command:report", "write an HTML page about a finished run of train.py"),
    "compare": (
        "tcaq_lightning.cli.compare:compare",
        "run methods side by side on one model",
    ),
    "export": ("tcaq_lightning.backends.command:export", "write an artifact's denoiser for other engines and tools"),
    "convert": ("tcaq_lightning.zoo.conversion.command:convert", "turn a published checkpoint into a diffusers model"),
    "config": ("tcaq_lightning.cli.config:config", "print all configuration keys, documented"),
}
"""By name, the function and what it does. A command's function is imported only when it is called."""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; None takes those of the process.

    Returns:
        The exit code, as `run_cli` makes it.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["convert"]:  # --config is the original repositories' name for it
        arguments = [re.sub(r"^--config(?==|$)", "--architecture", a) for a in arguments]
    return run_cli(lambda: run_command(COMMANDS, arguments, PROGRAM, EXAMPLE))


if __name__ == "__main__":
    sys.exit(main())
