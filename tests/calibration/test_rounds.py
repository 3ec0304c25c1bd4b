from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from tcaq_lightning.calibration import rounds as alignment
from tcaq_lightning.calibration.rounds import _reopen, _restored, _weigh_errors
from tcaq_lightning.calibration.run_dir import unit_path
from tcaq_lightning.config import Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.nn.state import quantization_state, settle
from tcaq_lightning.runtime.files import save_tensors

NAME = "mid_block.resnets.0"


@pytest.fixture
def finished(make_twins: Any, initialized: Any, tmp_path: Path) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A calibration whose only unit is finished and on disk, the unit, and its state."""
    twins = make_twins()
    unit, _, _ = initialized(twins, NAME)
    state = quantization_state(unit)
    save_tensors(unit_path(tmp_path, 0, 0, NAME), state, {"unit": NAME})
    settle(unit)
    run = SimpleNamespace(unit_file=lambda *place: unit_path(tmp_path, *place))
    return SimpleNamespace(graph=SimpleNamespace(names=[NAME]), quantized=twins.quantized, run=run), unit, state


def test_a_later_round_gets_the_logits_back(finished: Any) -> None:
    work, unit, state = finished
    assert all(layer.learned_weight.v is None for layer in quant_layers(unit).values())
    _reopen(work, 0, 0)
    got = quantization_state(unit)
    assert got.keys() == state.keys()
    assert all(torch.equal(got[k], state[k]) for k in state)


def test_a_restored_unit_is_settled(finished: Any) -> None:
    work, unit, state = finished
    codes = {n: layer.learned_weight.codes(torch.ones(1)) for n, layer in quant_layers(unit).items()}
    for layer in quant_layers(unit).values():
        layer.learned_weight.discard_logits()
    assert _restored(work, 0, 0) == {"unit": NAME}
    for name, layer in quant_layers(unit).items():
        assert layer.learned_weight.v is None
        assert torch.equal(layer.learned_weight.codes(torch.ones(1)), codes[name])
        assert torch.equal(layer.learned_weight.delta, state[f"{name}.weight_quantizer.delta"])
    assert _restored(work, 1, 0) is None


def test_a_file_that_is_damaged_under_way_ends_the_run(finished: Any) -> None:
    work, _, _ = finished
    file = work.run.unit_file(0, 0, NAME)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="was damaged while the run went on; the same command does the unit again"):
        _reopen(work, 0, 0)


def test_errors_are_weighed_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[dict[str, torch.Tensor]] = []

    def measure(*_: Any) -> dict[str, torch.Tensor]:
        measured.append({NAME: torch.rand(2, 3)})
        return measured[-1]

    monkeypatch.setattr(alignment, "unit_sensitivities", measure)
    monkeypatch.setattr(alignment, "sampler_gain", lambda *_: torch.ones(2))

    def weighed() -> torch.Tensor:
        work = MagicMock(config=Config(), run=SimpleNamespace(directory=tmp_path))
        _weigh_errors(work)
        found: torch.Tensor = work.sensitivities[NAME]
        return found

    first = weighed()
    assert torch.equal(weighed(), first)
    assert len(measured) == 1
    file = tmp_path / "calibration" / "sensitivities.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert torch.equal(weighed(), measured[1][NAME])
