from __future__ import annotations

import gc

import pytest

from tcaq_lightning.calibration.rounds import few_collected


def test_what_was_frozen_is_collected_again() -> None:
    gc.unfreeze()
    with few_collected():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_so_it_is_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), few_collected():
        raise RuntimeError("stop")
    assert gc.get_freeze_count() == 0
