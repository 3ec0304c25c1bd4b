"""The vectorised range search against a plain loop over channels and candidates.

python -m benchmarks.range_search --threads 1
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import median, run
from tcaq_lightning.quantizers.range_search import NORM, search_symmetric


def loop_search(rows: Tensor, bits: int, candidates: int) -> Tensor:
    """What `search_symmetric` finds, one channel and one candidate at a time, as published code does it.

    Args:
        rows: (R, N). bits: code width. candidates: shrink factors from 1 down to 0.2.

    Returns:
        (R,) steps.
    """
    top = 2 ** (bits - 1)
    steps = []
    for row in rows:
        limit = max(float(-row.min()) / top, float(row.max()) / (top - 1))
        best, best_error = limit, float("inf")
        for k in range(candidates):
            step = limit * (1 - 0.8 * k / (candidates - 1))
            quantized = torch.round(row / step).clamp(-top, top - 1) * step
            error = float((quantized - row).abs().pow(NORM).sum())
            if error < best_error:
                best, best_error = step, error
        steps.append(best)
    return torch.tensor(steps)


def range_search(
    channels: int = 256,
    inputs: int = 2304,
    bits: int = 4,
    candidates: int = 80,
    threads: int = 1,
    repetitions: int = 5,
) -> dict[str, Any]:
    """Search the steps of a normal weight both ways, in turn.

    Args:
        channels: R, output channels.
        inputs: N, weights of each.
        bits: code width.
        candidates: tried for each channel.
        threads: CPU threads.
        repetitions: of either side.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = torch.randn(channels, inputs, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {"vectorised": [], "loop": []}
    found = {}
    for _ in range(repetitions):
        for name, search in (("vectorised", search_symmetric), ("loop", loop_search)):
            started = time.perf_counter()
            found[name] = search(rows, bits, candidates)
            seconds[name].append(time.perf_counter() - started)
    torch.set_num_threads(before)
    fast, slow = (median(seconds[name]) for name in ("vectorised", "loop"))
    difference = (found["vectorised"] / found["loop"] - 1).abs()
    return {
        "shape": [channels, inputs],
        "threads": threads,
        "vectorised_seconds": fast,
        "loop_seconds": slow,
        "speed_up": slow / fast,
        "equal_channels": int((difference < 1e-5).sum()),
        "channels": channels,
    }


if __name__ == "__main__":
    run(range_search)
