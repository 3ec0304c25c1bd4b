from __future__ import annotations

from unittest import mock

import pytest
import torch

from tcaq_lightning.runtime.precision import autocast_type, autocasts, bfloat16_is_fast

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_for_float32_where_bfloat16_is_fast(fast: bool) -> None:
    with mock.patch.object(torch.cpu, "get_capabilities", return_value={"amx_bf16": fast}, create=True):
        assert autocasts("auto", CPU, FLOAT) == fast
        assert not autocasts("auto", CPU, torch.float16)
        assert not autocasts("auto", torch.device("meta"), FLOAT)
        assert [autocasts(setting, CPU, dtype) for setting in (True, False) for dtype in (FLOAT, torch.float16)] == [
            True,
            True,
            False,
            False,
        ]


def test_other_devices_are_asked_or_left_alone() -> None:
    with mock.patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation):
        assert bfloat16_is_fast(torch.device("cuda"))
    assert not bfloat16_is_fast(torch.device("mps"))


def test_the_type_that_a_product_would_narrow_to() -> None:
    x = torch.zeros(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_type(x) is torch.bfloat16
        assert autocast_type(x.to("meta")) is None
        assert autocast_type(x.double()) is None
    assert autocast_type(x) is None
