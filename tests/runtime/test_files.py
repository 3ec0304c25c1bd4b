from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from tcaq_lightning.runtime.files import (
    CheckedCheckpointIO,
    DamagedFileError,
    load_tensors,
    locked,
    naming,
    read_checkpoint,
    replacing,
    save_tensors,
    write_bytes,
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


@pytest.mark.parametrize("content", [b"", b"short", b"no safetensors at all", b"\xff" * 200])
def test_foreign_content_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DamagedFileError, match="x is damaged"):
        load_tensors(tmp_path / "x")
    with pytest.raises(DamagedFileError, match="x is damaged"):
        read_checkpoint(tmp_path / "x")


def test_any_library_reads_the_files(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": torch.arange(3)}, {"n": 1}, {"round": 0})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["record"]) == {"n": 1}
        assert json.loads(file.metadata()["place"]) == {"round": 0}
        assert torch.equal(file.get_tensor("a"), torch.arange(3))
    CheckedCheckpointIO().save_checkpoint({"global_step": 3}, tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True) == {"global_step": 3}


def test_equal_content_is_equal_files(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_tensors(tmp_path / name, {"b": torch.ones(3), "a": torch.zeros(2)}, {"n": 1}, {"round": 0, "unit": "c"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_file_is_of_one_place_alone(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"a": torch.ones(1)}, None, {"round": 0, "unit": "conv_in"})
    assert load_tensors(tmp_path / "x", {"unit": "conv_in", "round": 0})[0]["a"] == 1
    with pytest.raises(DamagedFileError, match=r"x is not of round 1, unit conv_in: it was written as round 0, unit"):
        load_tensors(tmp_path / "x", {"round": 1, "unit": "conv_in"})


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    CheckedCheckpointIO().save_checkpoint([1, 2], tmp_path / "x.ckpt")  # type: ignore[arg-type]
    with pytest.raises(DamagedFileError, match="is no checkpoint: it holds a list"):
        read_checkpoint(tmp_path / "x.ckpt")
    CheckedCheckpointIO().save_checkpoint({"x": Path("anything")}, tmp_path / "x.ckpt")
    with pytest.raises(DamagedFileError, match="is no checkpoint"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_processes_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    def work(name: str) -> None:
        with locked(tmp_path / "shared"):
            order.append(f"{name} begins")
            time.sleep(0.05)
            order.append(f"{name} ends")

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = order[0][0]
    second = "b" if first == "a" else "a"
    assert order == [f"{first} begins", f"{first} ends", f"{second} begins", f"{second} ends"]


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
