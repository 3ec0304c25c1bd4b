"""What runs a quantized denoiser, or takes it as a graph: a backend a file.

Every module here that defines a backend registers it, so that a new one is one new file: here, or anywhere else through
the configuration's `extensions`. `docs/extending.md` has an example.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    if not _module.ispkg:
        import_module(f"{__name__}.{_module.name}")
