"""Quantizers: pure functions, and small modules over them."""

from tcaq_lightning.quantizers.activation import ActivationQuantizer, SoftmaxQuantizer, TokenQuantizer
from tcaq_lightning.quantizers.output import OutputQuantizer
from tcaq_lightning.quantizers.weight import AdaRoundWeight, IntegerWeight, PackedWeight, Rounding

__all__ = [
    "ActivationQuantizer",
    "AdaRoundWeight",
    "IntegerWeight",
    "OutputQuantizer",
    "PackedWeight",
    "Rounding",
    "SoftmaxQuantizer",
    "TokenQuantizer",
]
