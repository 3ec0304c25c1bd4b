"""What diffusers' settings do to the quantized attentions of an artifact: none of them takes the quantization away.

A setting that is about memory or speed alone changes nothing, since a quantized processor knows one way to compute. A
processor that computes something else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from torch import nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.attention.processor import QuantAttnProcessor, quantized_processor

Method = Callable[..., Any]

ATTENTION_SETTINGS = (
    "fuse_projections",
    "set_attention_slice",
    "set_use_memory_efficient_attention_xformers",
    "set_use_npu_flash_attention",
    "set_use_xla_flash_attention",
    "unfuse_projections",
)
"""Methods of diffusers' attentions that are about memory or speed."""
DENOISER_SETTINGS = ("fuse_qkv_projections", "set_default_attn_processor", "unfuse_qkv_projections")
"""Methods of its denoisers that are."""


def keep_quantized(denoiser: nn.Module) -> None:
    """Make a frozen denoiser's quantized attentions stay what they are, in place.

    Args:
        denoiser: its attentions without a quantized processor may be set as ever.
    """
    attentions: list[Any] = [module for module in denoiser.modules() if quantized_processor(module) is not None]
    for attention in attentions:
        attention.__class__ = _attention_class(attention.__class__)
    if attentions:
        whole: Any = denoiser
        whole.__class__ = _denoiser_class(whole.__class__)


def replace_processor(attention: nn.Module, processor: QuantAttnProcessor) -> None:
    """Put another quantized processor into an attention, one of an artifact too."""
    nn.Module.__setattr__(attention, "processor", processor)


def refuse_other(attention: nn.Module, processor: Any) -> None:
    """See that a processor computes what an attention's quantized one stands for.

    Raises:
        UserError: it does not.
    """
    own = quantized_processor(attention)
    if own is None or processor is own or own.stands_for(attention, processor):
        return
    raise UserError(
        f"attention processor: expected {own.spec.processor}, for which this artifact was calibrated, or one that "
        f"computes the same, got {type(processor).__name__}; use the full-precision model for it"
    )


def _set_attribute(self: Any, name: str, value: Any) -> None:
    if name == "processor":
        refuse_other(self, value)  # and keep the quantized one, which computes the same
    else:
        nn.Module.__setattr__(self, name, value)


def _unchanged(self: Any, *args: Any, **kwargs: Any) -> None:
    """Change nothing: this setting is about memory or speed."""


def _all_or_none(set_processors: Method) -> Method:
    @wraps(set_processors)
    def set_attn_processor(self: Any, processor: Any) -> None:
        for name, module in self.named_modules():
            own = quantized_processor(module)
            refuse_other(module, processor.get(f"{name}.processor", own) if isinstance(processor, dict) else processor)
        set_processors(self, processor)

    return set_attn_processor


@cache
def _attention_class(kind: Any) -> type:
    return _subclass(kind, ATTENTION_SETTINGS, {"__setattr__": _set_attribute, "set_processor": refuse_other})


@cache
def _denoiser_class(kind: Any) -> type:
    setter: Method | None = getattr(kind, "set_attn_processor", None)
    return _subclass(kind, DENOISER_SETTINGS, {} if setter is None else {"set_attn_processor": _all_or_none(setter)})


def _subclass(kind: type, unchanged: tuple[str, ...], methods: dict[str, Method]) -> type:
    """A class of the same name whose methods change nothing, or are given; it is copied and pickled by its parent's."""
    kept = {name: _unchanged for name in unchanged if hasattr(kind, name)}

    def reduce(self: Any, protocol: Any) -> Any:
        make = _denoiser_class if unchanged is DENOISER_SETTINGS else _attention_class
        return (_new, (make, kind), *object.__reduce_ex__(self, protocol)[2:])

    return type(kind.__name__, (kind,), {**kept, **methods, "__reduce_ex__": reduce, "__module__": kind.__module__})


def _new(make: Callable[[type], type], kind: type) -> Any:
    made: Any = make(kind)
    return made.__new__(made)
