"""Freezing: integers in place of full-precision weights and rounding logits."""

from __future__ import annotations

import torch
from torch import nn

from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.quantizers import CodedWeight


@torch.no_grad()
def freeze(denoiser: nn.Module) -> None:
    """Make a calibrated denoiser's weights integers, in place: full-precision weights and rounding logits are dropped.

    Shifts that are all 0 are dropped too. Bias corrections are rounded to float16, in which they are stored; everything
    else computes the same bits as before.
    """
    for layer in quant_layers(denoiser).values():
        if layer.weight_quantizer.learns:
            codes = CodedWeight.from_rounded(layer.learned_weight, layer.input_quantizer.r)
            layer.weight_quantizer = codes.train(layer.training)
        if layer.input_quantizer.shift is not None and not layer.input_quantizer.shift.any():
            layer.input_quantizer.shift = None
        if layer.input_quantizer.shift is None:
            layer.shift_bias = None
        layer.fold_shift()
        if layer.bias_shift is not None:
            largest = torch.finfo(torch.float16).max
            layer.bias_shift.copy_(layer.bias_shift.clamp(-largest, largest).half())
