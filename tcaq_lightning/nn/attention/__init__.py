"""Quantized attention: processors that compute it in the open, a file for each kind.

A module here that registers a processor is found by its being here.
"""

from importlib import import_module
from pkgutil import iter_modules

from tcaq_lightning.nn.attention.calls import intercept, interception
from tcaq_lightning.nn.attention.fused import separate_all_projections, separate_projections
from tcaq_lightning.nn.attention.operations import mask_by_head, shares_input_quantizer
from tcaq_lightning.nn.attention.processor import PROCESSORS, QuantAttnProcessor, processor_name, quantized_processor
from tcaq_lightning.nn.attention.settings import keep_quantized, replace_processor

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "PROCESSORS",
    "QuantAttnProcessor",
    "intercept",
    "interception",
    "keep_quantized",
    "mask_by_head",
    "processor_name",
    "quantized_processor",
    "replace_processor",
    "separate_all_projections",
    "separate_projections",
    "shares_input_quantizer",
]
