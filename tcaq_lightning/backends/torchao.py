"""Linear layers on torchao's integer tensors, made from our integers and scales; nothing is quantized again.

With u = q - 2^(b-1), which int8 holds, and w = c - z_o, a quantized linear layer is

    y_o = s_g s_o sum_i (q_i - z_g) w_oi = s_g (s_o sum_i u_i w_oi + (2^(b-1) - z_g) s_o sum_i w_oi)

where r cancels. The sum over u w is the integer product, int8 x int8 with 32-bit sums; what depends on the timestep
group stays outside of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcaq_lightning.artifact.directory import OpenedArtifact
from tcaq_lightning.backends.base import BACKENDS, LEARNS, Backend, LayerKernel
from tcaq_lightning.backends.integers import centred, fits_int8
from tcaq_lightning.backends.packages import require
from tcaq_lightning.nn.layers import QuantLayer, QuantLinear
from tcaq_lightning.nn.parts import quant_layers, set_submodule
from tcaq_lightning.quantizers import CodedWeight, StoredTensor
from tcaq_lightning.quantizers.activation import along, per_sample

TORCHAO = "torchao"
MULTIPLE = 8
"""What both sizes of a weight must be divisible by in cuBLAS's product of integers."""
LEAST_ROWS = 32
"""Rows of an input are padded to these: cuBLAS's product takes no fewer than 17."""


@BACKENDS.register("torchao")
class TorchAO(Backend):
    """The simulation, with the products of linear layers on torchao's integer tensors; made for GPUs."""

    options = ("packed",)
    timed = False

    def check(self) -> None:
        """The integer tensors of torchao must be there."""
        _torchao()

    def can_run(self, layer: QuantLayer) -> str:
        """Why a layer's product cannot be torchao's."""
        return _reason(layer)

    def build(self, opened: OpenedArtifact, options: Mapping[str, Any]) -> nn.Module:
        """The denoiser with its linear layers exchanged."""
        map_linear_layers(opened.denoiser)
        return opened.denoiser

    def kernels(self, denoiser: nn.Module) -> list[LayerKernel]:
        """What runs each layer now: a layer that was not exchanged is simulated, even if it need not be."""
        return layer_kernels(denoiser)


class TorchAOWeight(CodedWeight):
    """An integer weight as torchao's `Int8Tensor`, whatever its code width.

    Attributes:
        tensor: (O, I) int8 of c - z_o with its scales; a product with it takes integers in int8's range as its input.
    """

    tensor: Tensor

    def __init__(self, source: CodedWeight) -> None:
        nn.Module.__init__(self)
        tensors = _torchao()
        self.shape, self.number_format = source.shape, source.number_format
        self.bits, self.conv_groups = source.bits, source.conv_groups
        self.register_buffer("scale", source.scale)
        self.register_buffer("zero_point", source.zero_point)
        self.offset = self.outer = None  # integers have neither
        integers = centred(source).to(torch.int8)
        one = torch.ones(1, 1, dtype=source.scale.dtype, device=integers.device)
        inputs = tensors.QuantizeTensorToInt8Kwargs(granularity=_per_tensor())
        self.register_buffer(
            "tensor",
            tensors.Int8Tensor(
                integers,
                source.scale[:, None].clone(),
                [1, integers.shape[1]],
                source.scale.dtype,
                act_quant_scale=one,  # integers are quantized to themselves
                act_quant_zero_point=torch.zeros_like(one, dtype=torch.int8),
                act_quant_kwargs=inputs,
            ),
        )

    @property
    def integers(self) -> Tensor:
        """(O, I) int8, c - z_o."""
        found: Tensor = self.tensor.qdata  # type: ignore[attr-defined]
        return found

    @property
    def codes(self) -> Tensor:  # type: ignore[override]
        """(O, I) uint8 in [0, 2^b - 1], made anew."""
        assert self.zero_point is not None
        return (self.integers + self.zero_point[:, None]).to(torch.uint8)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The codes, packed, in place of the integers."""
        return StoredTensor("tensor", self.codes, "codes", torch.uint8, self.bits), *self.stored_scales()


class TorchAOLinear(QuantLinear):
    """A finished `QuantLinear` whose product is torchao's.

    Attributes:
        weight_sums: (O,) s_o sum_i w_oi.
    """

    weight_sums: Tensor

    def __init__(self, source: QuantLinear) -> None:
        weight = cast("CodedWeight", source.weight_quantizer)
        QuantLayer.__init__(self, TorchAOWeight(weight), source.input_quantizer, source.bias, source.name, source.spec)
        self.dtype, self.in_features = source.dtype, source.in_features
        self.bias_shift, self.shift_bias = source.bias_shift, source.shift_bias
        self.output_quantizer = source.output_quantizer
        sums = centred(weight).sum(dim=1).to(weight.scale.dtype) * weight.scale
        self.register_buffer("weight_sums", sums, persistent=False)

    def product(self, quantized: Tensor, bias: Tensor | None) -> Tensor:
        """W x for an input on the quantizer's grid, by integers; in full precision while its quantizer is off."""
        inputs, weight = self.input_quantizer, cast("TorchAOWeight", self.weight_quantizer)
        if not inputs.enabled:
            return super().product(quantized, bias)
        current = inputs.groups.of_rows(quantized.shape[0])
        step = per_sample(inputs.steps(), current, quantized.ndim)
        zero = per_sample(inputs.zero_point, current, quantized.ndim) - 2 ** (inputs.bits - 1)
        # A multiple of a step divided by the step rounds to the very integer that the quantizer found.
        integers = torch.round(quantized / (step * along(inputs.scales(), quantized.ndim, -1))).add_(zero)
        rows = integers.flatten(0, -2)
        padded = F.pad(rows, (0, 0, 0, max(LEAST_ROWS - rows.shape[0], 0)))
        sums = F.linear(padded, weight.tensor)[: rows.shape[0]].view(*quantized.shape[:-1], self.out_channels)
        y: Tensor = (sums - zero * self.weight_sums).mul_(step)
        return y if bias is None else y + bias


def map_linear_layers(denoiser: nn.Module) -> None:
    """Give a frozen denoiser's linear layers torchao's tensors where these can hold them, in place.

    Raises:
        UserError: torchao is not installed.
    """
    _torchao()
    for kernel in layer_kernels(denoiser):
        if not kernel.reason:
            layer: Any = denoiser.get_submodule(kernel.name)
            set_submodule(denoiser, kernel.name, TorchAOLinear(layer).train(layer.training).requires_grad_(False))


def layer_kernels(denoiser: nn.Module) -> list[LayerKernel]:
    """What computes each quantized layer, or could; the matmuls of attentions are never on integers here."""
    found = []
    for name, layer in quant_layers(denoiser).items():
        found.append(LayerKernel(name, layer.spec.kind, isinstance(layer, TorchAOLinear), _reason(layer)))
    return found


def _reason(layer: QuantLayer) -> str:
    """Why a layer's product cannot be torchao's, or nothing."""
    weight = layer.weight_quantizer
    if isinstance(layer, TorchAOLinear):
        return ""
    if not isinstance(layer, QuantLinear):
        return "a convolution"
    if weight.learns:
        return LEARNS
    if not weight.number_format.integers:
        return f"weights in the number format {weight.number_format.name}"
    if layer.input_quantizer.is_dynamic:
        return "steps of its input are found token by token"
    if layer.input_quantizer.kind != "uniform":
        return f"inputs quantized by {layer.input_quantizer.kind}"
    if layer.in_features % MULTIPLE or layer.out_channels % MULTIPLE:
        return f"a size is not a multiple of {MULTIPLE}"
    if not fits_int8(cast("CodedWeight", weight)):
        return "asymmetric weights beyond int8"
    return ""


def _torchao() -> Any:
    with _quiet():
        return require("torchao.quantization.quantize_.workflows.int8.int8_tensor", TORCHAO)


def _per_tensor() -> Any:
    return require("torchao.quantization.granularity", TORCHAO).PerTensor()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torchao logs about kernels of other processors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
