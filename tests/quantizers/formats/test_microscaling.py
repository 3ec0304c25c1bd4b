"""MX formats and NVFP4 against encoders written with ml_dtypes, and comfy-kitchen's where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcaq_lightning.quantizers import FORMATS, AdaRoundWeight, CodedWeight, make_format

ml_dtypes = pytest.importorskip("ml_dtypes")
ELEMENTS = {
    "mxfp8": ("float8_e4m3fn", 8),
    "mxfp8_e5m2": ("float8_e5m2", 15),
    "mxfp6": ("float6_e2m3fn", 2),
    "mxfp6_e3m2": ("float6_e3m2fn", 4),
    "mxfp4": ("float4_e2m1fn", 2),
}
ONE = torch.ones(1)


def weight(scale: float = 0.05, outputs: int = 8, inputs: int = 160) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(outputs, inputs, generator=generator) * scale
    values[0, :64] = 0  # whole blocks of nothing
    values[1, 3], values[2, 5] = 40 * scale, -1e-12
    return values


def with_scales(name: str, values: Tensor, scales: Tensor, outer: Tensor | None = None) -> CodedWeight:
    """The weight rounded to nearest with given scales, (O, blocks)."""
    quantizer = AdaRoundWeight(values, make_format(name, FORMATS[name].widths[0]))
    quantizer.delta.copy_(scales)
    if outer is not None and quantizer.outer is not None:
        quantizer.outer.copy_(outer)
    quantizer.reset_rounding(ONE)
    return CodedWeight.from_rounded(quantizer, ONE)


def specified(values: Tensor, element: str, largest_exponent: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Scale bytes and element bytes by OCP Microscaling Formats 1.0, section 6.3, saturating."""
    blocks = values.numpy().reshape(len(values), -1, 32)
    reach = np.abs(blocks).max(-1)
    exponent = np.floor(np.log2(np.where(reach > 0, reach, 1))) - largest_exponent
    dtype = getattr(ml_dtypes, element)
    most = float(ml_dtypes.finfo(dtype).max)
    elements = np.clip(blocks / np.exp2(exponent)[..., None], -most, most).astype(dtype)
    return (exponent + 127).astype(np.uint8), elements.reshape(values.shape).view(np.uint8)


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("scale", [0.05, 1e-30, 1e30])
def test_mx_bytes_are_those_of_the_specification(name: str, scale: float) -> None:
    values = weight(scale).bfloat16().float()  # many values in the middle of two
    scales, elements = specified(values, *ELEMENTS[name])
    coded = with_scales(name, values, torch.exp2(torch.from_numpy(scales).float() - 127))
    assert np.array_equal(coded.scale.numpy(), scales)
    assert np.array_equal(coded.codes.numpy(), elements)


@pytest.mark.parametrize("name", ELEMENTS)
def test_searched_mx_scales_are_no_worse_than_the_specifications(name: str) -> None:
    values = weight()
    number_format = make_format(name, FORMATS[name].widths[0])
    found = number_format.search(number_format.sharing.rows(values)).scale.view(8, 5)
    scales, _ = specified(values, *ELEMENTS[name])
    errors = [
        (with_scales(name, values, chosen)(ONE) - values).abs().pow(2.4).sum()
        for chosen in (found, torch.exp2(torch.from_numpy(scales).float() - 127))
    ]
    assert errors[0] <= errors[1]
    assert torch.equal(found.log2(), found.log2().round())


def test_nvfp4_bytes_are_those_of_an_encoder_of_ones_own() -> None:
    values = weight().bfloat16().float()
    blocks = values.numpy().reshape(8, -1, 16)
    outer = np.float32(np.abs(blocks).max() / np.float32(448 * 6))
    reach = np.abs(blocks).max(-1) / np.float32(6)
    bytes_ = np.clip(reach / outer, 2.0**-9, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    scales = bytes_.astype(np.float32) * outer
    elements = np.clip(blocks / scales[..., None], -6, 6).astype(ml_dtypes.float4_e2m1fn).reshape(8, -1)
    coded = with_scales("nvfp4", values, torch.from_numpy(scales), torch.tensor([outer]))
    assert np.array_equal(coded.scale.view(torch.uint8).numpy(), bytes_.view(np.uint8))
    assert np.array_equal(coded.codes.numpy(), elements.view(np.uint8))
    assert coded.outer is not None
    decoded = elements.astype(np.float32).reshape(8, -1, 16) * scales[..., None]
    assert np.array_equal(coded(ONE).numpy(), decoded.reshape(8, -1))


def test_a_block_may_reach_four_or_six() -> None:
    """[4, 3] is exact where the largest magnitude becomes 4, and not where it becomes 6."""
    values = torch.zeros(2, 16)
    values[0, :2], values[1, 0] = torch.tensor([4.0, 3.0]), 448 * 6.0
    number_format = make_format("nvfp4", 4)
    found = number_format.search(values)
    assert torch.equal(number_format.nearest(values / found.scale[:, None]) * found.scale[:, None], values)
