"""Figures of merit of a set of images, a file each.

Every module here registers its metric, so that a new one is one new file: here, or anywhere else through the
configuration's `extensions`. `docs/extending.md` has an example.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
