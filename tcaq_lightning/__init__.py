"""Post-training quantization of diffusion models: TCAQ-DM as a PyTorch Lightning reconstruction trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tcaq_lightning.registration import register

if TYPE_CHECKING:
    from tcaq_lightning.artifact import load_quantized
    from tcaq_lightning.job import quantize

__version__ = "0.1.0"
__all__ = ["load_quantized", "quantize"]

register()


def __getattr__(name: str) -> Any:
    """Import what needs torch and diffusers only when it is asked for."""
    if name == "load_quantized":
        from tcaq_lightning.artifact import load_quantized

        return load_quantized
    if name == "quantize":
        from tcaq_lightning.job import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
