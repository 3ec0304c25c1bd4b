"""Number formats, a file each: a module here that registers one is found by its being here."""

from importlib import import_module
from pkgutil import iter_modules

from tcaq_lightning.quantizers.formats.base import FORMATS, NumberFormat, Sharing, make_format
from tcaq_lightning.quantizers.formats.levels import LevelTable

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["FORMATS", "LevelTable", "NumberFormat", "Sharing", "make_format"]
