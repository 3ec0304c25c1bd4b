"""What a backend is: what it can run, how it takes the denoiser over, and what it has to have installed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from tcaq_lightning.artifact.directory import OpenedArtifact
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.runtime.registry import Registry

LEARNS = "still learns its rounding"


@dataclass(frozen=True)
class LayerKernel:
    """What computes one quantized layer.

    Attributes:
        name: of the layer.
        kind: its class in full precision.
        integer: whether its product runs on integers.
        reason: why it cannot, or empty.
    """

    name: str
    kind: str
    integer: bool
    reason: str


class Backend(ABC):
    """What runs a quantized denoiser. A subclass registers itself: `@BACKENDS.register("openvino")`.

    Args:
        name: under which it is registered.
    """

    options: ClassVar[tuple[str, ...]] = ()
    """Options of `load_quantized` that it takes. `packed` says whether weights stay packed in memory."""
    timed: ClassVar[bool] = True
    """Whether latency is measured on it, which is done on a CPU."""

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self) -> None:
        """Check that all that it needs is installed; here that is nothing.

        Raises:
            UserError: something is not; the message names the extra that installs it.
        """
        return

    @abstractmethod
    def can_run(self, layer: QuantLayer) -> str:
        """Why it cannot run a layer's product on integers; empty if it can.

        What it cannot run on integers it computes in floating point, on the same values.

        Args:
            layer: of a frozen denoiser.
        """

    @abstractmethod
    def build(self, opened: OpenedArtifact, options: Mapping[str, Any]) -> nn.Module:
        """The denoiser that runs on it, called as the one that it stands for.

        Args:
            opened: the artifact, whose denoiser simulates integers in PyTorch; it may be changed in place.
            options: those of `options` that were given.

        Raises:
            UserError: it is not installed, or an option cannot be worked with.
        """

    def kernels(self, denoiser: nn.Module) -> list[LayerKernel]:
        """What runs, or would run, each layer of a frozen denoiser, in execution order."""
        return [
            LayerKernel(name, layer.spec.kind, not (reason := self.can_run(layer)), reason)
            for name, layer in quant_layers(denoiser).items()
        ]


BACKENDS: Registry[type[Backend]] = Registry("backend")
"""Backends by name."""


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UserError: there is none.
    """
    try:
        return BACKENDS[name](name)
    except UserError as error:
        raise UserError(f"backend: {error}") from None


def layer_kernels(denoiser: nn.Module, backend: str) -> list[LayerKernel]:
    """What runs, or would run, each quantized layer on a backend; matmuls of attentions are not listed.

    Args:
        denoiser: frozen.
        backend: its name.

    Raises:
        UserError: there is no such backend.
    """
    return find_backend(backend).kernels(denoiser)
