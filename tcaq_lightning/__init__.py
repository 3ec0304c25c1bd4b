"""Post-training quantization of diffusion models: TCAQ-DM as a PyTorch Lightning reconstruction trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tcaq_lightning.artifact.registration import register
from tcaq_lightning.runtime.version import VERSION

if TYPE_CHECKING:
    from tcaq_lightning.api import quantize
    from tcaq_lightning.backends.load import load_quantized

__version__ = VERSION
__all__ = ["load_quantized", "quantize"]

register()


def __getattr__(name: str) -> Any:
    """Import what needs torch and diffusers only when it is asked for."""
    if name == "load_quantized":
        from tcaq_lightning.backends.load import load_quantized

        return load_quantized
    if name == "quantize":
        from tcaq_lightning.api import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
