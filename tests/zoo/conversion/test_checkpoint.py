"""Checkpoint files: what is read, and that nothing in them is ever run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from tcaq_lightning.errors import UserError
from tcaq_lightning.zoo.conversion.checkpoint import listing, read_checkpoint, tensors


def refused(path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_lightning_stored_beside_the_weights_does_no_harm(tmp_path: Path) -> None:
    """As in the published Stable Diffusion file: the callback's class as a key, counters as numpy scalars."""
    path = tmp_path / "model.ckpt"
    content = {
        "state_dict": {"a": torch.arange(3.0)},
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.5), "current_score": torch.tensor(1.0)}},
        "epoch": np.int64(4),
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": []}],
    }
    torch.save(content, path)
    before = torch.serialization.get_safe_globals()
    read = read_checkpoint(path)
    assert torch.equal(read["state_dict"]["a"], torch.arange(3.0))
    assert ModelCheckpoint not in read["callbacks"]  # a stand-in is
    assert set(torch.serialization.get_safe_globals()) == set(before)


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", [Harmful(), {"state_dict": {"a": torch.zeros(1)}, "more": Harmful()}])
def test_code_in_a_checkpoint_is_not_run(content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "model.ckpt")
    warnings.simplefilter("error")
    refused(tmp_path / "model.ckpt", r"got one that calls (posix|nt)\.mkdir, which is not run")
    assert not (tmp_path / "harm").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    refused(path, "got no file")
    refused(tmp_path, "got a directory")
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[:100], whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(content)
        refused(path, "damaged or foreign")
    other = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10)}, other)
    assert torch.equal(read_checkpoint(other)["a"], torch.zeros(10))
    other.write_bytes(other.read_bytes()[:-8])
    refused(other, "damaged or foreign")


def test_plain_state_dicts() -> None:
    one = {"a": torch.ones(1)}
    assert tensors(one) == one
    assert tensors({"module.a": one["a"]}) == one
    assert tensors({"module.a": one["a"], "b": one["a"]}).keys() == {"module.a", "b"}  # type: ignore[union-attr]
    for other in ({}, [], {"a": 1}, {1: one["a"]}, None):
        assert tensors(other) is None


def test_long_lists_of_keys_are_cut() -> None:
    assert listing([f"{i:03}" for i in range(53)]).endswith("049, and 3 more")
