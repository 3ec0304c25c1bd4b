"""DAQ."""

from __future__ import annotations

from dataclasses import dataclass

from tcaq_lightning.config.checks import Section


@dataclass
class DAQConfig(Section):
    """Dynamically adaptive quantization of post-softmax layers (docs/method.md, "DAQ")."""

    enabled: bool = True
    """Off: every group is uniform."""
    rule: str = "error"
    """likelihood: the better fitting tail; error: the smaller error of the attention's output. Both are recorded."""
    family: str = "log2"
    """The logarithmic quantizer that is compared with the uniform one: log2, log_sqrt2 or adalog."""
