"""Write `configs/default.yaml`.

python -m tcaq_lightning.config > configs/default.yaml
"""

from __future__ import annotations

import sys

from tcaq_lightning.config.config import Config
from tcaq_lightning.config.keys import documented_yaml

HEADER = """\
# Every key with its description, type and default. A config of your own needs only what differs from this one.
#
#   python -m tcaq_lightning.config > configs/default.yaml       writes this file anew
#   python train.py --config configs/default.yaml

"""


def default_file() -> str:
    """The text of `configs/default.yaml`."""
    return HEADER + documented_yaml(Config)


if __name__ == "__main__":
    sys.stdout.write(default_file())
