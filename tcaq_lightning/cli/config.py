"""Command: all configuration keys."""

from __future__ import annotations

import sys

from tcaq_lightning.config.__main__ import default_file


def config() -> None:
    """Print every key of a configuration with description, type and default, as a YAML file.

    Example:
        python -m tcaq_lightning config > all_keys.yaml
    """
    sys.stdout.write(default_file())
