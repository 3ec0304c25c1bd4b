"""Files of weights that engines read, a format a file: a module here that registers one is found by its being here."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
