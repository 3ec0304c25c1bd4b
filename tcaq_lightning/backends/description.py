"""What can be asked of a denoiser whose graph an engine runs: its parts, without weights."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from torch import nn

from tcaq_lightning.backends.refusals import refuse
from tcaq_lightning.models.architectures import on_meta
from tcaq_lightning.runtime.provided import provide


class Described:
    """Methods of a part that is there to be looked at: it computes nothing, and nothing of it changes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse it."""
        refuse("forward of a part of the denoiser")

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse it."""
        refuse(name)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse it: the part is never called."""
        refuse("register_forward_hook of a part of the denoiser")

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse it: the part is never called."""
        refuse("register_forward_pre_hook of a part of the denoiser")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse it."""
        refuse("load_state_dict of a part of the denoiser")


class Description:
    """A denoiser without weights, made when something of it is asked for first, by whichever thread.

    Args:
        name: of its class.
        config: of the denoiser.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.name, self.config = name, config
        self._lock = threading.Lock()
        self._made: nn.Module | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies make their own."""
        return type(self), (self.name, self.config)

    def attribute(self, name: str) -> Any:
        """An attribute of the denoiser; AttributeError if it has none of that name."""
        with self._lock:
            if self._made is None:
                made = on_meta({"_class_name": self.name, **self.config})
                for module in list(made.modules()):
                    provide(module, Described)
                self._made = made
        return getattr(self._made, name)
