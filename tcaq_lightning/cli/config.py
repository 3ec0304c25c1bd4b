"""Command: all configuration keys."""

from __future__ import annotations

import sys

from tcaq_lightning.config import Config
from tcaq_lightning.config.keys import documented_yaml

HEADER = """\
# Every key with its description, type and default. A config of your own needs only what differs from this one.
#
#   python -m tcaq_lightning config > configs/default.yaml       writes this file anew
#   python train.py --config configs/default.yaml

"""


def config() -> None:
    """Print every key of a configuration with description, type and default, as a YAML file.

    Example:
        python -m tcaq_lightning config > all_keys.yaml
    """
    sys.stdout.write(default_file())


def default_file() -> str:
    """The text of `configs/default.yaml`."""
    return HEADER + documented_yaml(Config)
