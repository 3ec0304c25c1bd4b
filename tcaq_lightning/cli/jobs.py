"""Runs of the main job in processes of their own, one on each device at a time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import torch

from tcaq_lightning.api import all_steps
from tcaq_lightning.calibration.run_dir import Run
from tcaq_lightning.config import Config
from tcaq_lightning.runtime.distributed.launch import launched
from tcaq_lightning.runtime.exit_codes import run_cli
from tcaq_lightning.runtime.extensions import load_extensions
from tcaq_lightning.runtime.lightning import quiet_lightning


def run_jobs(configs: Sequence[Config], devices: int, tell: Callable[[str], None]) -> None:
    """Make all runs; each has a process of its own, whose memory is measured by itself and given back at its end.

    Args:
        configs: of the runs, in order.
        devices: runs at a time; GPUs are dealt to them, threads of a CPU shared among them.
        tell: is told a line about each run that ends.

    Raises:
        SystemExit: a run failed, with its exit code; it has said why. Those that had begun are ended first.
    """
    free: Queue[int] = Queue()
    for number in range(devices):
        free.put(number)
    failed: list[int] = []

    def make(numbered: tuple[int, Config]) -> None:
        if failed:
            return
        number, config = numbered
        device, began = free.get(), time.perf_counter()
        try:
            code = _run_one(config, device, devices)
        finally:
            free.put(device)
        if code:
            failed.append(code)
        else:
            tell(f"{number + 1} of {len(configs)}: {config.run_dir.name}, {time.perf_counter() - began:.0f} s")

    with ThreadPoolExecutor(devices) as pool:
        list(pool.map(make, enumerate(configs)))
    if failed:
        sys.exit(failed[0])


def _run_one(config: Config, device: int, devices: int) -> int:
    """Exit code of one run in its own process."""
    process = multiprocessing.get_context("spawn").Process(target=_job, args=(config, device, devices), daemon=True)
    process.start()
    process.join()
    code = process.exitcode or 0
    return code if code >= 0 else 128 - code  # as a shell says that a signal ended it


def _job(config: Config, device: int, devices: int) -> None:
    if devices > 1:
        _take_share(config, device, devices)
    sys.exit(run_cli(lambda: _work(config)))


def _take_share(config: Config, device: int, devices: int) -> None:
    """Leave the other runs' devices and threads alone."""
    if torch.cuda.device_count() > device:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    elif config.trainer.threads is None:
        config.trainer.threads = max(1, torch.get_num_threads() // devices)


def _work(config: Config) -> None:
    quiet_lightning()
    load_extensions(config.extensions)
    with launched(config), Run(config) as run:
        if not run.finished:
            all_steps(config, run)
