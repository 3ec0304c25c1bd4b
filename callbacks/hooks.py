"""Hooks on the inputs of quantizers during an observation pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def hook_inputs(
    modules: dict[str, nn.Module], receive: Callable[[str, nn.Module, Tensor], None]
) -> list[RemovableHandle]:
    """Call `receive(name, module, input)` whenever one of the modules runs; returns the handles to remove."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: receive(name, module, args[0])

    return [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
