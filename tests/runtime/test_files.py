from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from tcaq_lightning.runtime.files import (
    CheckedCheckpointIO,
    DamagedFileError,
    load_tensors,
    naming,
    read_checked,
    replacing,
    save_tensors,
    write_bytes,
    write_checked,
)


def test_tensors_and_record_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2).t(), "b": torch.arange(4), "empty": torch.zeros(0)}
    save_tensors(tmp_path / "deep" / "x", tensors, {"seconds": 0.1, "names": ["a"]})
    loaded, record = load_tensors(tmp_path / "deep" / "x")
    assert record == {"seconds": 0.1, "names": ["a"]}
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors.items())


@given(data=st.data())
def test_no_flipped_bit_or_cut_passes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("files") / "x"
    save_tensors(path, {"a": torch.arange(5.0)}, 1)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=str(path)):
        load_tensors(path)


def test_foreign_content_is_damage(tmp_path: Path) -> None:
    write_checked(tmp_path / "x", b"no safetensors")
    assert read_checked(tmp_path / "x") == b"no safetensors"
    with pytest.raises(DamagedFileError, match="x is damaged"):
        load_tensors(tmp_path / "x")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    with pytest.raises(TypeError), replacing(path) as temporary, temporary.open("wb") as stream:
        stream.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nameless_errors_get_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="x") as caught, replacing(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(OSError, match="inner") as caught, naming(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "inner")
    assert caught.value.filename == "inner"


def test_a_full_disk_is_one_whoever_writes(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, naming(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(SafetensorError, match="invalid header"), naming(tmp_path):
        raise SafetensorError("invalid header")


def test_checkpoints(tmp_path: Path) -> None:
    io, path = CheckedCheckpointIO(), tmp_path / "x.ckpt"
    io.save_checkpoint({"state_dict": {"v": torch.ones(2)}, "global_step": 3}, path)
    assert io.load_checkpoint(path)["global_step"] == 3
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=str(path)):
        io.load_checkpoint(path)
