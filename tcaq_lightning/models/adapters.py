"""Adapters in a full-precision pipeline: what is quantized and stored has none beside its layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from tcaq_lightning.errors import UserError


def refuse_adapters(pipeline: Any) -> None:
    """Check that no network of a pipeline has adapters of peft, such as LoRA, beside its layers.

    Those of the denoiser would be left out. Those of another network would be all that transformers writes of it into
    the artifact.

    Args:
        pipeline: full precision.

    Raises:
        UserError: a network has some, active or not.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and (kind := _adapter(part)) is not None:
            raise UserError(
                f"{name}: expected no adapters beside its layers, got {kind}; call fuse_lora() and "
                "unload_lora_weights() of the pipeline first, or peft's merge_and_unload()"
            )


def _adapter(network: nn.Module) -> str | None:
    """Class of the first adapter in a network, with peft's module, such as `lora.Linear`; None if there is none."""
    for module in network.modules():
        kind = type(module)
        if any(base.__name__ == "BaseTunerLayer" and base.__module__.startswith("peft.") for base in kind.__mro__):
            return f"{kind.__module__.split('.')[-2]}.{kind.__name__}"
    return None
