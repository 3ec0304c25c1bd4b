from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.restore import finish_unit, reopen, restored
from tcaq_lightning.calibration.run_files import RunFiles
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.nn.state import quantization_state

NAME = "mid_block.resnets.0"
VISIT = Visit(0, 0, NAME)

RECORD = {
    "unit": NAME,
    "round": 0,
    "position": 0,
    "kept": True,
    "before": 1.0,
    "after": 0.5,
    "flipped": 0.0,
    "samples": 4,
    "seconds": {"learn": 0.1},
    "executions": {"learn": 8},
}
Finished = tuple[nn.Module, RunFiles, dict[str, Tensor]]


@pytest.fixture
def finished(make_twins: Any, initialized: Any, tmp_path: Path) -> Finished:
    """A unit that is finished and on disk, the run's files, and its state."""
    unit, _, _ = initialized(make_twins(), NAME)
    state, files = quantization_state(unit), RunFiles(tmp_path)
    files.round_dir(0).mkdir(parents=True)
    for phase in ("r", "v"):
        files.checkpoint(VISIT, phase).path.touch()
    assert finish_unit(unit, VISIT, RECORD, files) == RECORD
    assert not list(tmp_path.rglob("*.ckpt"))
    return unit, files, state


def test_a_later_round_gets_the_logits_back(finished: Finished) -> None:
    unit, files, state = finished
    assert all(layer.learned_weight.v is None for layer in quant_layers(unit).values())
    reopen(unit, VISIT, files)
    got = quantization_state(unit)
    assert got.keys() == state.keys()
    assert all(torch.equal(got[k], state[k]) for k in state)


def test_a_restored_unit_is_settled(finished: Finished) -> None:
    unit, files, state = finished
    codes = {n: layer.learned_weight.codes(torch.ones(1)) for n, layer in quant_layers(unit).items()}
    for layer in quant_layers(unit).values():
        layer.learned_weight.discard_logits()
    assert restored(unit, VISIT, files) == RECORD
    for name, layer in quant_layers(unit).items():
        assert layer.learned_weight.v is None
        assert torch.equal(layer.learned_weight.codes(torch.ones(1)), codes[name])
        assert torch.equal(layer.learned_weight.delta, state[f"{name}.weight_quantizer.delta"])
    assert restored(unit, Visit(1, 0, NAME), files) is None


def test_a_file_that_is_damaged_under_way_ends_the_run(finished: Finished) -> None:
    unit, files, _ = finished
    file = files.unit(VISIT).path
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="was damaged while the run went on; the same command does the unit again"):
        reopen(unit, VISIT, files)
