from __future__ import annotations

import logging
import os
import warnings

import pytest
import torch

from tcaq_lightning.runtime.undisturbed import undisturbed


def test_what_is_changed_within_is_put_back_even_after_an_error() -> None:
    logger, handler = logging.getLogger("tests.undisturbed"), logging.NullHandler()
    logger.setLevel(logging.INFO)
    threads, filters, random = torch.get_num_threads(), list(warnings.filters), torch.get_rng_state()

    def disturb() -> None:
        logger.setLevel(logging.ERROR)
        logger.addHandler(handler)
        logger.propagate = False
        warnings.filterwarnings("ignore", "anything")
        torch.set_num_threads(threads + 1)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.manual_seed(3)
        os.environ["TCAQ_DISTURBED"] = "1"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), undisturbed():
        disturb()
    assert logger.level == logging.INFO
    assert logger.propagate
    assert handler not in logger.handlers
    assert list(warnings.filters) == filters
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert "TCAQ_DISTURBED" not in os.environ
