"""NF4 against an encoder by thresholds, and torchao's where it is installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tcaq_lightning.quantizers import AdaRoundWeight, CodedWeight, make_format
from tcaq_lightning.quantizers.formats.normal import LEVELS
from tcaq_lightning.quantizers.formats.scales import QuantizedScales

ONE = torch.ones(1)


def coded(weight: Tensor) -> CodedWeight:
    """By largest magnitudes, as QLoRA does it."""
    quantizer = AdaRoundWeight(weight, make_format("nf4", 4))
    reach = weight.view(len(weight), -1, 64).abs().amax(-1)
    outer = QuantizedScales().outer(reach)
    assert quantizer.outer is not None
    quantizer.outer.copy_(outer)
    quantizer.delta.copy_(QuantizedScales().storable(reach, outer))
    quantizer.reset_rounding(ONE)
    return CodedWeight.from_rounded(quantizer, ONE)


def test_levels_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, equation 4, with its offset of 0.9677083."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    quantiles = torch.cat([negative, torch.zeros(1), positive.flip(0)]) / positive.max()
    torch.testing.assert_close(torch.tensor(LEVELS), quantiles, rtol=0, atol=1e-5)


def test_each_weight_takes_the_nearest_level() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    found = coded(weight)
    scale = found.scales().repeat_interleave(64, 1)
    distance = (weight[..., None] / scale[..., None] - torch.tensor(LEVELS)).abs()
    assert torch.equal(found.codes.long(), distance.argmin(-1))
    reach = weight.view(32, -1, 64).abs().amax(-1)
    assert float((found.scales() / reach - 1).abs().max()) < 0.01  # 8 bits of the spread around the mean


def test_torchao_has_the_same_scales_and_decodes_the_same() -> None:
    """Its codes are those of scales that were not rounded yet, so that a few differ."""
    pytest.importorskip("torchao")
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor

    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    theirs = NF4Tensor.from_tensor(weight, 64, 256)
    ours = coded(weight)
    assert torch.equal(ours.scale.flatten(), theirs.quantized_scalers.flatten())
    assert ours.outer is not None
    assert torch.equal(ours.outer[:-1], theirs.quantization_factor.flatten())
    assert torch.equal(ours.outer[-1], theirs.scaler_mean)
    packed = theirs.quantized_data  # the first of two in the high half
    codes = torch.stack([packed >> 4, packed & 15], 1).view(256, 256)
    assert float((ours.codes != codes).float().mean()) < 0.01
    ours.codes.copy_(codes)
    torch.testing.assert_close(ours(ONE), theirs.get_original_weight(), rtol=0, atol=5e-4)  # levels of four digits
