"""An early look at the names of parts, so that a mistake ends a run before it has taken any time."""

from __future__ import annotations

from tcaq_lightning.config import Config
from tcaq_lightning.methods.daq import RULES
from tcaq_lightning.methods.reparameterization import named
from tcaq_lightning.quantizers import SOFTMAX_KINDS


def check_methods(config: Config) -> None:
    """Check that everything that `tcr` and `daq` name is registered.

    Raises:
        UserError: something is not; the message names the key and what there is.
    """
    named(config.tcr)
    _ = RULES[config.daq.rule], SOFTMAX_KINDS[config.daq.family]
