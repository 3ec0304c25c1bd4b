from __future__ import annotations

from typing import Any

from torch import nn

from tcaq_lightning.models.units import find_units


def test_every_layer_is_in_exactly_one_unit(make_unet: Any) -> None:
    unet = make_unet()
    units = find_units(unet)
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert sum(name == unit or name.startswith(unit + ".") for unit in units) == 1
