"""What diffusers' methods of a denoiser do where an engine runs its graph: nothing, or they are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, NoReturn

from torch import nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.attention import PROCESSORS, QuantAttnProcessor
from tcaq_lightning.runtime.provided import with_signature

HARMLESS = frozenset(
    {
        "compile_repeated_blocks",
        "disable_adapters",
        "disable_cache",
        "disable_forward_chunking",
        "disable_freeu",
        "disable_gradient_checkpointing",
        "disable_lora",
        "disable_npu_flash_attention",
        "disable_xformers_memory_efficient_attention",
        "disable_xla_flash_attention",
        "enable_forward_chunking",
        "enable_gradient_checkpointing",
        "enable_group_offload",
        "enable_npu_flash_attention",
        "enable_xformers_memory_efficient_attention",
        "enable_xla_flash_attention",
        "fuse_qkv_projections",
        "reset_attention_backend",
        "set_attention_backend",
        "set_attention_slice",
        "set_default_attn_processor",
        "set_use_memory_efficient_attention_xformers",
        "set_use_npu_flash_attention",
        "set_use_xla_flash_attention",
        "share_memory",
        "unfuse_qkv_projections",
        "unload_lora",
        "zero_grad",
    }
)
"""Methods that are about memory or speed, or that switch off what is not there."""
WORKING = frozenset(
    {"cache_context", "push_to_hub", "register_to_config", "save_config", "to_json_file", "to_json_string"}
)
"""Methods of diffusers that work on a config, or on nothing else than what a stand-in has."""
OF_MODULES = frozenset(
    {
        "add_module",
        "get_buffer",
        "get_parameter",
        "load_state_dict",
        "named_parameters",
        "register_buffer",
        "register_module",
        "register_parameter",
        "set_submodule",
        "share_memory",
        "state_dict",
        "zero_grad",
    }
)
"""Methods of torch's modules that are about weights or parts."""
INNER = ("ConfigMixin", "ModelMixin", "PushToHubMixin")
"""Classes of diffusers whose private methods serve their public ones."""


def refuse(name: str) -> NoReturn:
    """Say that something cannot act on a graph.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"{name}: expected a denoiser that PyTorch runs, got the fixed graph of an engine; open the artifact with "
        'load_quantized(path, backend="torch")'
    )


def stand_in_methods(kind: type[nn.Module], stand_in: type) -> dict[str, Any]:
    """What takes the place of a denoiser class' methods and properties in what stands for it.

    Args:
        kind: class of the denoiser.
        stand_in: what it has itself stays.

    Returns:
        By name: class methods are those of `kind`, properties are described, methods do nothing or are refused.
    """
    made: dict[str, Any] = {}
    for name in dir(kind):
        found = inspect.getattr_static(kind, name)
        if name.startswith("__") or name in vars(stand_in) or (hasattr(nn.Module, name) and name not in OF_MODULES):
            continue
        if isinstance(found, (classmethod, staticmethod)):
            made[name] = staticmethod(getattr(kind, name))
        elif isinstance(found, property):
            made[name] = _described(name)
        elif isinstance(found, FunctionType) and name not in WORKING and not _is_inner(kind, name):
            made[name] = with_signature(found, _instead_of(name))
    return made


def _is_inner(kind: type, name: str) -> bool:
    owner = next(base for base in kind.__mro__ if name in vars(base))
    return name.startswith("_") and owner.__name__ in INNER


def _described(name: str) -> property:
    return property(lambda self: self._description.attribute(name))


def _instead_of(name: str) -> Callable[..., Any]:
    if name == "set_attn_processor":
        return _set_attn_processor
    return (lambda *_, **__: None) if name in HARMLESS else (lambda *_, **__: refuse(name))


def _set_attn_processor(self: Any, processor: Any) -> None:
    _check_processors(processor, self._description.attribute("attn_processors"))


def _check_processors(processors: Any, described: dict[str, Any]) -> None:
    """See that attention processors compute what a graph does.

    Args:
        processors: one, or several by name.
        described: those of the denoiser in full precision.

    Raises:
        UserError: one computes something else.
    """
    own = {type(processor).__name__ for processor in described.values()}
    quantized = {PROCESSORS[name] for name in own if name in PROCESSORS}
    for processor in processors.values() if isinstance(processors, dict) else [processors]:
        kind = type(processor)
        same = kind.__name__ in PROCESSORS and PROCESSORS[kind.__name__] in quantized
        faster = bool(quantized) and kind.__name__ in QuantAttnProcessor.variants
        if not (kind.__module__.startswith("diffusers.") and (kind.__name__ in own or same or faster)):
            refuse(f"attention processor {kind.__name__}")
