"""Every number of the configuration has bounds, and a message about it names the whole key, wherever it came from."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcaq_lightning.cli import parse_config
from tcaq_lightning.config import Config, SamplerConfig
from tcaq_lightning.config.keys import keys_of
from tcaq_lightning.errors import UserError

OUT_OF_RANGE = [10**40, -(10**40), 1e300, -1e300, float("nan"), float("inf")]


def numeric_keys(kind: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every key that is a number, or a number or null, and whether it is whole."""
    for key in keys_of(kind):
        name, hints = f"{prefix}{key.name}", typing.get_args(key.hint) or (key.hint,)
        if key.section is not None:
            yield from numeric_keys(key.section, f"{name}.")
        elif {int, float} & set(hints) and typing.get_origin(key.hint) is not list:
            yield name, float not in hints


KEYS = dict(numeric_keys(Config))


def test_nested_keys_are_among_them() -> None:
    assert {"seed", "calibration.sampler.num_steps", "evaluation.sampler.eta", "calibration.memory_budget.disk"} <= set(
        KEYS
    )
    assert len(KEYS) > 60


def refused(key: str, read: Any) -> None:
    with pytest.raises(UserError) as caught:
        read()
    assert re.search(rf"(^|[ :]){re.escape(key)}\b", str(caught.value)), (key, str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["yaml", "option", "python"])
@settings(deadline=None, max_examples=120)
@given(key=st.sampled_from(sorted(KEYS)), value=st.sampled_from(OUT_OF_RANGE))
def test_the_whole_key_is_named(tmp_path_factory: pytest.TempPathFactory, way: str, key: str, value: float) -> None:
    text = str(value) if isinstance(value, int) else {"nan": ".nan", "inf": ".inf"}.get(str(value), str(value))
    if way == "yaml":
        file: Path = tmp_path_factory.getbasetemp() / "number.yaml"
        *sections, last = key.split(".")
        file.write_text(
            "".join(f"{'  ' * i}{name}:\n" for i, name in enumerate(sections))
            + f"{'  ' * len(sections)}{last}: {text}\n"
        )
        refused(key, lambda: parse_config(["--config", str(file)]))
    elif way == "option":
        refused(key, lambda: parse_config([f"--{key}={text}"]))
    else:
        config: Any = Config()
        config.evaluation.sampler = SamplerConfig()
        *sections, last = key.split(".")
        owner = config
        for name in sections:
            owner = getattr(owner, name)
        setattr(owner, last, value)
        refused(key, config.check)
