"""Quantizers: pure functions, small modules over them, and the contracts `Quantizer` and `NumberFormat`.

Number formats are a file each in `formats/`. Quantizers of activations are a file each here; one that registers itself
is found by its being here.
"""

from importlib import import_module
from pkgutil import iter_modules

from tcaq_lightning.quantizers.activation import ACTIVATION_QUANTIZERS, ActivationQuantizer
from tcaq_lightning.quantizers.base import Quantizer, StoredTensor
from tcaq_lightning.quantizers.formats import (
    FORMATS,
    FloatScales,
    Grid,
    LevelTable,
    NumberFormat,
    ScaleType,
    Sharing,
    make_format,
)
from tcaq_lightning.quantizers.output import OutputQuantizer
from tcaq_lightning.quantizers.softmax import SOFTMAX_KINDS, SoftmaxKind, SoftmaxQuantizer
from tcaq_lightning.quantizers.token import TokenQuantizer
from tcaq_lightning.quantizers.weight import AdaRoundWeight, CodedWeight, PackedWeight, Rounding, WeightQuantizer

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "ACTIVATION_QUANTIZERS",
    "FORMATS",
    "SOFTMAX_KINDS",
    "ActivationQuantizer",
    "AdaRoundWeight",
    "CodedWeight",
    "FloatScales",
    "Grid",
    "LevelTable",
    "NumberFormat",
    "OutputQuantizer",
    "PackedWeight",
    "Quantizer",
    "Rounding",
    "ScaleType",
    "Sharing",
    "SoftmaxKind",
    "SoftmaxQuantizer",
    "StoredTensor",
    "TokenQuantizer",
    "WeightQuantizer",
    "make_format",
]
