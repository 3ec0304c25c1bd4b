"""What diffusers' settings do to the quantized attentions of an artifact: none of them takes the quantization away.

A setting that is about memory or speed alone changes nothing, since a quantized processor knows one way to compute. A
processor that computes something else is refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.attention.processor import QuantAttnProcessor, quantized_processor
from tcaq_lightning.runtime.provided import provide


def keep_quantized(denoiser: nn.Module) -> None:
    """Make a frozen denoiser's quantized attentions stay what they are, in place.

    Args:
        denoiser: its attentions without a quantized processor may be set as ever.
    """
    attentions = [module for module in denoiser.modules() if quantized_processor(module) is not None]
    for attention in attentions:
        provide(attention, KeptAttention)
    if attentions and hasattr(denoiser, "set_attn_processor"):
        provide(denoiser, KeptAttentions)
    if hasattr(denoiser, "enable_forward_chunking"):
        provide(denoiser, ChunkedForward)


def replace_processor(attention: nn.Module, processor: QuantAttnProcessor) -> None:
    """Put another quantized processor into an attention, one of an artifact too."""
    nn.Module.__setattr__(attention, "processor", processor)


def refuse_other(attention: Any, processor: Any) -> None:
    """Check that a processor computes what an attention's quantized one stands for.

    Raises:
        UserError: it does not.
    """
    own = quantized_processor(attention)
    if own is None or processor is getattr(attention, "processor", None) or own.stands_for(attention, processor):
        return
    raise UserError(
        f"attention processor: expected {own.spec.processor}, for which this artifact was calibrated, or one that "
        f"computes the same, got {type(processor).__name__}; use the full-precision model for it"
    )


def _unchanged(self: Any, *args: Any, **kwargs: Any) -> None:
    """Change nothing: this setting is about memory or speed."""


class KeptAttention:
    """Methods of an attention that keeps its quantized processor."""

    fuse_projections = unfuse_projections = _unchanged
    set_attention_slice = _unchanged
    set_use_memory_efficient_attention_xformers = _unchanged
    set_use_npu_flash_attention = set_use_xla_flash_attention = _unchanged

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "processor":
            refuse_other(self, value)  # and keep the quantized one, which computes the same
        else:
            super().__setattr__(name, value)

    def set_processor(self, processor: Any) -> None:
        """Keep the quantized processor, if the given one computes the same.

        Raises:
            UserError: it does not.
        """
        refuse_other(self, processor)


class KeptAttentions:
    """Methods of a denoiser whose attentions keep their quantized processors."""

    fuse_qkv_projections = unfuse_qkv_projections = _unchanged
    set_default_attn_processor = _unchanged

    def set_attn_processor(self: Any, processor: Any) -> None:
        """Set the processors of all attentions that are not quantized, or of none if some other one is refused.

        Raises:
            UserError: a processor computes something else than the quantized one in its place.
        """
        for name, module in self.named_modules():
            own = getattr(module, "processor", None)
            refuse_other(module, processor.get(f"{name}.processor", own) if isinstance(processor, dict) else processor)
        super().set_attn_processor(processor)  # type: ignore[misc]

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        """Refuse IP-Adapters, which put processors with weights of their own into all attentions.

        Raises:
            UserError: always.
        """
        raise UserError(
            "load_ip_adapter: an artifact's attentions are quantized as they were calibrated and take no image "
            "prompts; use the full-precision model for it"
        )


class ChunkedForward:
    """Methods of a denoiser whose feed-forward layers can run on parts of their input."""

    def enable_forward_chunking(self, chunk_size: int | None = None, dim: int = 0) -> None:
        """As diffusers does it, for parts of a sequence.

        Raises:
            UserError: for parts of a batch, whose samples' timesteps the layers would not know.
        """
        if dim == 0:
            raise UserError(
                "enable_forward_chunking: expected dim=1, parts of a sequence, got dim=0: an artifact's layers must "
                "see the whole batch, whose samples have timesteps of their own"
            )
        super().enable_forward_chunking(chunk_size, dim)  # type: ignore[misc]
