"""Layers and settings that the tests of quantized layers share."""

from __future__ import annotations

from torch import nn

from tcaq_lightning.config import ActivationConfig, LayerRule, QuantizationConfig, SoftmaxConfig, WeightConfig
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


def config(*rules: LayerRule) -> QuantizationConfig:
    return QuantizationConfig(
        weight=WeightConfig(bits=4),
        activation=ActivationConfig(bits=6),
        softmax=SoftmaxConfig(bits=7),
        rules=list(rules),
    )


def groups() -> TimestepGroups:
    return TimestepGroups([500.0])


class Model(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
