from __future__ import annotations

import pytest

from tcaq_lightning.config import Config, DAQConfig, TCRConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.methods.check import check_methods


def test_all_that_there_is_passes() -> None:
    for formula in ("searched", "profile", "smoothquant", ["searched", "smoothquant"]):
        for family in ("log2", "log_sqrt2", "adalog"):
            check_methods(Config(tcr=TCRConfig(formula=formula), daq=DAQConfig(rule="likelihood", family=family)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(tcr=TCRConfig(formula="smooth")), r"unknown tcr.formula 'smooth'; expected one of .*smoothquant"),
        (Config(tcr=TCRConfig(formula=["searched", "no"])), r"unknown tcr.formula 'no'"),
        (Config(daq=DAQConfig(rule="best")), r"unknown daq.rule 'best'; expected one of error, likelihood"),
        (Config(daq=DAQConfig(family="log3")), r"unknown daq.family 'log3'; expected one of adalog, log2, log_sqrt2"),
    ],
)
def test_an_unknown_name_is_refused_with_its_key(config: Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_methods(config)
