"""Adapters beside the quantized layers of an artifact: peft's LoRA and its kin, in full precision.

peft takes a quantized layer for an ordinary one, since it is of its class, and puts a module around it that adds what
the adapters compute of the unquantized input. The artifact itself stays as it is: nothing is fused into its weights,
and saving leaves adapters out, which `save_lora_weights` writes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.layers import QuantLayer, base_layer


class BesideAdapters:
    """Methods of a denoiser beside whose quantized layers there may be adapters."""

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Refuse it.

        Raises:
            UserError: always.
        """
        raise UserError(
            "fuse_lora: an artifact's weights are integers and take nothing in; leave the adapters loaded beside them, "
            "or fuse them into the full-precision model and quantize that"
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; diffusers' loader for Flux looks up the shapes of weights in it, which are there for that alone."""
        found: Any = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        return found if args or "destination" in kwargs else _StateDict(self, found)


class _StateDict(OrderedDict[str, Tensor]):
    """A state dict that knows the weights of quantized layers when it is asked for them, but does not list them."""

    def __init__(self, denoiser: Any, found: Any) -> None:
        super().__init__(found)
        self._denoiser = denoiser
        self._metadata = found._metadata

    def __missing__(self, key: str) -> Tensor:
        name, _, kind = key.rpartition(".")
        module = dict(self._denoiser.named_modules()).get(name) if kind == "weight" else None
        if module is None or not isinstance(layer := base_layer(module), QuantLayer):
            raise KeyError(key)
        return layer.weight

    def __reduce__(self) -> Any:
        """What is stored of it is an ordinary state dict."""
        return OrderedDict, (), {"_metadata": self._metadata}, None, iter(self.items())


def without_adapters(denoiser: Any, shared: object) -> Any:
    """The denoiser, or if it has adapters, one of the same tensors without them; it stays as it is itself.

    Args:
        denoiser: frozen.
        shared: what both have, beside the tensors.

    Raises:
        UserError: an adapter has changed parameters of the denoiser.
    """
    if getattr(denoiser, "_transformer_norm_layers", None):
        raise UserError(
            "save_pretrained: an adapter has changed norms of the denoiser; call unload_lora_weights() first"
        )
    if not any("base_layer" in module._modules for module in denoiser.modules()):
        return denoiser
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    bare = copy.deepcopy(denoiser, {id(part): part for part in (*tensors, shared)})
    for name, module in list(bare.named_modules()):
        if "base_layer" in module._modules:
            parent, _, child = name.rpartition(".")
            setattr(bare.get_submodule(parent), child, base_layer(module))
    return bare
