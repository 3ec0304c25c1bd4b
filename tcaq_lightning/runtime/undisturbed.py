"""Leaving the process of a caller as it was."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore, even after an error, what the work inside the context changes for the whole process.

    That is: warning filters, every logger's level, handlers and flags, torch's threads, random state, default type and
    gradient mode, and the environment.
    """
    loggers, numerics, environment = _loggers(), _numerics(), dict(os.environ)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices):
            yield
    finally:
        _restore_loggers(loggers)
        threads, dtype, gradients = numerics
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)


def _numerics() -> tuple[int, torch.dtype, bool]:
    return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()


def _loggers() -> dict[logging.Logger, dict[str, Any]]:
    """The settings of every existing logger."""
    known = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    return {
        logger: {
            "level": logger.level,
            "disabled": logger.disabled,
            "propagate": logger.propagate,
            "handlers": list(logger.handlers),
            "filters": list(logger.filters),
        }
        for logger in [logging.root, *known]
    }


def _restore_loggers(before: dict[logging.Logger, dict[str, Any]]) -> None:
    for logger, settings in before.items():
        logger.setLevel(settings["level"])
        logger.disabled, logger.propagate = settings["disabled"], settings["propagate"]
        logger.handlers[:], logger.filters[:] = settings["handlers"], settings["filters"]
