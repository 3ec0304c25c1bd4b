"""Weights on every number format: searched, learned, frozen, packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tcaq_lightning.quantizers import (
    FORMATS,
    AdaRoundWeight,
    CodedWeight,
    NumberFormat,
    PackedWeight,
    Rounding,
    make_format,
)
from tcaq_lightning.quantizers.packing import pack

FLOATS = ("e4m3", "e5m2", "e3m4", "e2m5", "e3m2", "e2m3", "e2m1")
BLOCKS = ("mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4", "nvfp4", "nf4", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1")
MADE = [
    *(make_format(name, FORMATS[name].widths[0]) for name in (*FLOATS, *BLOCKS)),
    make_format("e4m3", 8, granularity="tensor"),
    make_format("int", 4, granularity=16),
    make_format("int", 4, symmetric=False, granularity=16),
    make_format("int", 8, granularity="tensor"),
]
SHAPES = [(6, 64), (5, 70), (4, 6, 3, 3)]
EVERY = pytest.mark.parametrize("number_format", MADE, ids=lambda f: f"{f.name}-{f.bits}-{f.granularity}")


def weight_of(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * 0.1, torch.rand(shape[1], generator=generator) + 0.5


@EVERY
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_packed_codes_give_the_bits_of_the_learned_weight(
    number_format: NumberFormat, shape: tuple[int, ...]
) -> None:
    weight, r = weight_of(shape)
    quantizer = AdaRoundWeight(weight, number_format)
    quantizer.search(r)
    for rounding in (Rounding.NEAREST, Rounding.SOFT):
        learned = quantizer.begin_learning(rounding, r)
        (quantizer(r) * weight).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for values in learned.values() for p in values)
        with torch.no_grad():
            for parameter in (p for values in learned.values() for p in values):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
        quantizer.end_learning()
    expected = quantizer(r)
    coded = CodedWeight.from_rounded(quantizer, r)
    packed = PackedWeight(
        pack(coded.codes, coded.bits),
        coded.shape,
        coded.scale,
        coded.zero_point,
        number_format,
        offset=coded.offset,
        outer=coded.outer,
    )
    for other in (coded, packed):
        assert torch.equal(other(r), expected)
    bytes_ = sum(item.tensor.numel() * item.dtype.itemsize for item in packed.stored)
    needed = number_format.bits_per_weight(shape) * weight.numel() / 8
    assert needed - 1e-6 <= bytes_ < needed + 1


@EVERY
def test_untouched_rounding_is_to_nearest(number_format: NumberFormat) -> None:
    weight, _ = weight_of((6, 64))
    weight = weight.bfloat16().float()  # many values in the middle of two
    one = torch.ones(1)
    quantizer = AdaRoundWeight(weight, number_format)
    quantizer.search(one)
    soft_start = quantizer.begin_learning(Rounding.SOFT, one) and quantizer(one)
    quantizer.end_learning()
    scaled = quantizer._in_steps(one)
    zero = quantizer.zeros(weight)
    nearest = number_format.nearest(scaled, zero)
    chosen = number_format.decode(quantizer.codes(one), zero)
    if number_format.zero_points:  # integers round the middle up
        assert torch.equal((chosen - scaled).abs(), (nearest - scaled).abs())
    else:
        assert torch.equal(chosen, nearest)
    inside = (quantizer.logits > -9) & (quantizer.logits < 9)
    torch.testing.assert_close(soft_start[inside], weight[inside], rtol=1e-3, atol=1e-5)


def test_learned_scales_are_seen_as_they_will_be_stored() -> None:
    weight, _ = weight_of((6, 64))
    one = torch.ones(1)
    for name in ("mxfp4", "nvfp4", "q4_0", "nf4"):
        quantizer = AdaRoundWeight(weight, make_format(name, 4))
        quantizer.search(one)
        (log_scale,) = quantizer.begin_learning(Rounding.NEAREST, one)["weight_scales"]
        with torch.no_grad():
            log_scale.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(0))
        seen = quantizer.scales()
        seen.sum().backward()
        assert log_scale.grad is not None
        assert bool((log_scale.grad != 0).all())
        quantizer.end_learning()
        assert torch.equal(seen.detach(), quantizer.scale)
        assert torch.equal(CodedWeight.from_rounded(quantizer, one).scales(), quantizer.scale)
