from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
from benchmarks.common import anonymous_memory
from tcaq_lightning.memory import freed_memory_reused
import torch

def kept():
    before = anonymous_memory()
    blocks = [torch.ones(4 << 20) for _ in range(8)]  # 16 MiB each
    held = torch.ones(1 << 10)  # above them, so that the heap cannot shrink
    del blocks
    return anonymous_memory() - before

with freed_memory_reused(False):
    returned = kept()
with freed_memory_reused(True):
    reused = kept()
print(reused, returned)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told")
def test_freed_memory_is_kept_or_given_back() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    reused, returned = map(int, ended.stdout.split())
    assert reused > 100 << 20
    assert returned < 10 << 20
