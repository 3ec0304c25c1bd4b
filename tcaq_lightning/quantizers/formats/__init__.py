"""Number formats, a file each: a module here that registers one is found by its being here."""

from importlib import import_module
from pkgutil import iter_modules

from tcaq_lightning.quantizers.formats.base import FORMATS, Grid, NumberFormat, Sharing, make_format
from tcaq_lightning.quantizers.formats.levels import LevelTable
from tcaq_lightning.quantizers.formats.scales import FloatScales, ScaleType

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["FORMATS", "FloatScales", "Grid", "LevelTable", "NumberFormat", "ScaleType", "Sharing", "make_format"]
