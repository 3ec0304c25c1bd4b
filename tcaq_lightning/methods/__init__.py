"""The method's parts, a concept a file.

Every module here enters what it registers, so that a new reparameterization or rule is one new file: here, or anywhere
else through the configuration's `extensions`. `docs/extending.md` has an example.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
