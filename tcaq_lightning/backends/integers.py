"""A weight's integers around zero, as kernels take them."""

from __future__ import annotations

from torch import Tensor

from tcaq_lightning.quantizers import CodedWeight


def centred(weight: CodedWeight) -> Tensor:
    """Codes around their zero points, c - z_o, (O, ...) int32."""
    codes = weight.codes
    assert weight.zero_point is not None
    return codes.int() - weight.zero_point.int().view(-1, *[1] * (codes.ndim - 1))


def fits_int8(weight: CodedWeight) -> bool:
    """Whether codes around their zero points are in [-128, 127]; asymmetric ones of 8 bits may not be."""
    integers = centred(weight)
    return int(integers.min()) >= -128 and int(integers.max()) <= 127
