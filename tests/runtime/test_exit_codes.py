from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tcaq_lightning.errors import RankLostError, UserError
from tcaq_lightning.runtime.distributed.environment import Place
from tcaq_lightning.runtime.exit_codes import run_cli


def raising(error: BaseException) -> Any:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize(("value", "code"), [(None, 0), (0, 0), (3, 3)])
def test_result_is_the_exit_code(value: int | None, code: int) -> None:
    assert run_cli(lambda: value) == code


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("seed must be 0"), "error: seed must be 0"),
        (argparse.ArgumentError(None, 'key "num":\n  Expected'), 'error: key "num": Expected'),
        (OSError(errno.ENOSPC, "No space left on device", "/full/file"), "/full/file"),
        (PermissionError(errno.EACCES, "Permission denied", "/closed"), "/closed"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (SystemExit("wrong use"), "error: wrong use"),
        (UserError("two\nlines, \x1b[2J and \x00"), r"two lines, \x1b[2J and \x00"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a/plots"), "something else is in its place"),
        (MemoryError(), "out of memory (MemoryError)"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            "reconstruction.batch_size",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore advice"), "the same command"),
    ],
)
def test_mistakes_are_one_line(error: BaseException, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(raising(error)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert text in err


def test_a_full_disk_asks_for_space_and_a_directory_in_the_way_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    for number, advised in ((errno.ENOSPC, True), (errno.EISDIR, False), (errno.ENOTDIR, False), (errno.EACCES, False)):
        assert run_cli(raising(OSError(number, os.strerror(number), "/some/file"))) == 2
        assert ("free space" in capsys.readouterr().err) == advised


CLOSED = """
import sys
from rich.console import Console
from tcaq_lightning.runtime.exit_codes import run_cli
write = {write}
def work():
    for _ in range(100_000):
        write("some text")
sys.exit(run_cli(work))
"""
INTERRUPTED = """
import os, signal, sys, time
from tcaq_lightning.runtime.exit_codes import run_cli
def work():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    finally:
        {within}
code = run_cli(work)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("write", ["Console().print", "sys.stdout.write"])
def test_a_closed_pipe_is_said(write: str) -> None:
    code = CLOSED.format(write=write)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert (process.wait(), err.count("\n")) == (141, 1)
    assert err.startswith("error: nobody reads")


@pytest.mark.slow
@pytest.mark.parametrize("within", ["pass", "os.kill(os.getpid(), signal.SIGINT)"])
def test_ctrl_c_twice_ends_without_a_traceback(within: str) -> None:
    code = INTERRUPTED.format(within=within)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "")


@pytest.mark.parametrize("error", [ValueError("a fault"), OSError(errno.EIO, "a broken disk")])
def test_faults_propagate(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_cli(raising(error))


def test_interrupts() -> None:
    assert run_cli(raising(KeyboardInterrupt())) == 130
    assert run_cli(raising(SystemExit(0))) == 0

    def as_lightning() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    assert run_cli(as_lightning) == 130


def test_sigterm_cleans_up(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    temporary = tmp_path / "half.tmp"

    def terminated() -> None:
        try:
            temporary.touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb the clean-up
            temporary.unlink()

    assert run_cli(terminated) == 143
    assert not temporary.exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_process_complains_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, lines in ((0, 1), (1, 0)):
        for name, value in Place(rank, rank, 2, 1, port=1).variables().items():
            monkeypatch.setenv(name, value)
        assert run_cli(raising(UserError("seed must be 0"))) == 2
        assert capsys.readouterr().err.count("\n") == lines
        assert run_cli(raising(RankLostError("rank 0 is gone"))) == 75  # nobody else may be there to say it
        assert capsys.readouterr().err == "error: rank 0 is gone\n"


def test_slurm_announces_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = signal.getsignal(signal.SIGUSR1)

    def waiting() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(10)

    assert run_cli(waiting) == 143
    assert signal.getsignal(signal.SIGUSR1) == before
