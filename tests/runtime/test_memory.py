from __future__ import annotations

import subprocess
import sys

import pytest

from tcaq_lightning.runtime.memory import peak_memory

SCRIPT = """
from pathlib import Path
from tcaq_lightning.runtime.memory import freed_memory_reused
import torch

def anonymous_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

def kept():
    before = anonymous_memory()
    blocks = [torch.ones(4 << 20) for _ in range(8)]  # 16 MiB each
    held = torch.ones(1 << 10)  # above them, so that the heap cannot shrink
    del blocks
    return anonymous_memory() - before

with freed_memory_reused(False):
    returned = kept()
with freed_memory_reused(True):
    with freed_memory_reused(False):
        pass
    reused = kept()
print(reused, returned)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told")
def test_freed_memory_is_kept_or_given_back() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    reused, returned = map(int, ended.stdout.split())
    assert reused > 100 << 20
    assert returned < 10 << 20


def test_peak_memory_rises_with_what_is_touched_and_stays() -> None:
    if peak_memory() is None:
        pytest.skip("this system does not tell a process' peak memory")
    code = (
        "from tcaq_lightning.runtime.memory import peak_memory\n"
        "before = peak_memory(); block = bytearray(b'x') * 50_000_000; after = peak_memory(); del block\n"
        "print(before, after, peak_memory())"
    )  # in a fresh process: in this one the block would lie in pages that earlier tests have freed
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after, later = map(int, shown.split())
    assert 45_000_000 < after - before < 60_000_000
    assert later == pytest.approx(after, rel=0.01)
