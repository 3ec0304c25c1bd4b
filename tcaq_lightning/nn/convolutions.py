"""Quantized convolutions of sequences and volumes, and transposed ones; that of images is in `layers.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcaq_lightning.nn.layers import LAYERS, QuantConvolution, QuantLayer


class QuantConv1d(QuantConvolution, nn.Conv1d):  # type: ignore[misc, override]
    """Quantized `nn.Conv1d`."""

    function = staticmethod(F.conv1d)


class QuantConv3d(QuantConvolution, nn.Conv3d):  # type: ignore[misc, override]
    """Quantized `nn.Conv3d`."""

    function = staticmethod(F.conv3d)


class QuantTransposedConvolution(QuantLayer):
    """A quantized transposed convolution.

    Its weight is kept as that of a convolution from its inputs to its outputs, (O, I / groups, ...), so that scales by
    output channel and factors of input channels are where every layer has them.

    Attributes:
        function: of torch, that computes it.
    """

    channel_dim = 1
    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, source: Any, *args: Any) -> None:
        super().__init__(*args)
        self.dtype = source.weight.dtype
        self.stride, self.padding, self.dilation = source.stride, source.padding, source.dilation
        self.output_padding, self.groups = source.output_padding, source.groups
        self.in_channels, self.kernel_size = source.in_channels, source.kernel_size
        self._output_sizes = source._output_padding

    @property
    def weight(self) -> Tensor:
        """(I, O / groups, ...) as `nn.ConvTranspose2d` has it."""
        return exchanged(super().weight, self.groups)

    @staticmethod
    def source_weight(source: Any) -> Tensor:
        """(I, O / groups, ...) as (O, I / groups, ...), in the same memory where there is one group."""
        return exchanged(source.weight, source.groups)

    @staticmethod
    def is_pointwise(source: Any) -> bool:  # noqa: ARG004
        """Never: outputs see different numbers of inputs."""
        return False

    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # noqa: A002 - as torch has it
        output_size: list[int] | None = None,
    ) -> Tensor:
        """Quantize the input and compute the output, of the given size if the stride leaves it open."""
        if output_size is None:
            return super().forward(input)
        before, spatial = self.output_padding, input.ndim - 2
        self.output_padding = self._output_sizes(
            input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        try:
            return super().forward(input)
        finally:
            self.output_padding = before

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The transposed convolution with a given weight, (O, I / groups, ...)."""
        weight = exchanged(weight, self.groups)
        return type(self).function(
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


class QuantConvTranspose1d(QuantTransposedConvolution):
    """Quantized `nn.ConvTranspose1d`."""

    function = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(QuantTransposedConvolution):
    """Quantized `nn.ConvTranspose2d`."""

    function = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(QuantTransposedConvolution):
    """Quantized `nn.ConvTranspose3d`."""

    function = staticmethod(F.conv_transpose3d)


def exchanged(weight: Tensor, groups: int) -> Tensor:
    """The first two axes of a convolution's weight exchanged within each group; its own inverse.

    >>> import torch
    >>> exchanged(torch.zeros(6, 2, 3), groups=2).shape
    torch.Size([4, 3, 3])
    """
    if groups == 1:
        return weight.transpose(0, 1)
    by_group = torch.unflatten(weight, 0, (groups, -1))  # (groups, I / groups, O / groups, ...)
    back: Tensor = by_group.transpose(1, 2).flatten(0, 1)
    return back


LAYERS.update(
    {
        nn.Conv1d: QuantConv1d,
        nn.Conv3d: QuantConv3d,
        nn.ConvTranspose1d: QuantConvTranspose1d,
        nn.ConvTranspose2d: QuantConvTranspose2d,
        nn.ConvTranspose3d: QuantConvTranspose3d,
    }
)
