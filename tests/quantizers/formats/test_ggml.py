"""GGUF's blocks of integers against the reference decoder and encoder of the gguf package."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcaq_lightning.quantizers import FORMATS, AdaRoundWeight, CodedWeight, make_format

gguf = pytest.importorskip("gguf")
NAMES = ("q8_0", "q5_0", "q5_1", "q4_0", "q4_1")
ONE = torch.ones(1)


def kind(name: str) -> Any:
    return gguf.GGMLQuantizationType[name.upper()]


def unpacked(name: str, data: NDArray[np.uint8]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (O, K) as we number them, scales and minima (O, blocks), of the bytes that gguf writes."""
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[kind(name)][1])
    rows, offset = len(data), 2 if name.endswith("_0") else 4
    halves = torch.from_numpy(blocks[:, :offset].copy()).view(torch.float16).float()
    rest = torch.from_numpy(blocks[:, offset:].copy())
    if name == "q8_0":
        codes = rest.view(torch.int8).int() + 128
    else:
        high = rest[:, : rest.shape[1] - 16]
        low = rest[:, -16:]
        codes = torch.cat([low & 15, low >> 4], 1).int()
        if high.shape[1]:
            word = torch.from_numpy(high.numpy().copy().view(np.uint32).astype(np.int64))
            codes += ((word >> torch.arange(32)) & 1).int() * 16
    minima = halves[:, 1].reshape(rows, -1) if offset == 4 else None
    return codes.reshape(rows, -1), halves[:, 0].reshape(rows, -1), minima


def random_weight(scale: float = 0.1) -> Tensor:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) * scale
    weight[0, :32], weight[1, 4] = 0, 30 * scale
    return weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.1, 1e-5, 1e4])
def test_what_gguf_encodes_is_decoded_to_the_bit(name: str, scale: float) -> None:
    data = gguf.quants.quantize(random_weight(scale).numpy(), kind(name))
    codes, scales, minima = unpacked(name, data)
    number_format = make_format(name, FORMATS[name].widths[0])
    coded = CodedWeight(codes.to(torch.uint8), scales.half(), None, number_format, offset=minima)
    assert np.array_equal(coded(ONE).numpy(), gguf.quants.dequantize(data, kind(name)))


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q4_0"])
def test_codes_are_those_of_gguf_for_its_scale(name: str) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)).clamp(-2.5, 2.5)
    number_format = make_format(name, FORMATS[name].widths[0])
    end = number_format.ends[0] if name != "q8_0" else number_format.ends[1]
    weight.view(-1, 32)[:, 7] = end / 2 ** round(np.log2(abs(end) / 4))  # a scale that is a power of two
    codes, scales, _ = unpacked(name, gguf.quants.quantize(weight.numpy(), kind(name)))
    quantizer = AdaRoundWeight(weight, number_format)
    quantizer.delta.copy_(scales)
    quantizer.reset_rounding(ONE)
    assert torch.equal(quantizer.codes(ONE).int(), codes)


@pytest.mark.parametrize("name", NAMES)
def test_the_search_finds_no_worse_scales_than_gguf(name: str) -> None:
    weight = random_weight()
    quantizer = AdaRoundWeight(weight, make_format(name, FORMATS[name].widths[0]))
    quantizer.search(ONE)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind(name)), kind(name))
    ours = float((quantizer(ONE) - weight).square().mean())
    assert ours <= float((torch.from_numpy(theirs) - weight).square().mean())
    assert not quantizer(ONE)[0, :32].any()
