"""The method's parts, a concept a file. Importing this package enters the registered ones."""

from tcaq_lightning.methods import smoothquant, tcr

__all__ = ["smoothquant", "tcr"]
