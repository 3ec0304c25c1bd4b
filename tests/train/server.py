"""Runs scripts in forked processes, so that a test need not wait for their imports.

Reads a line for each set of processes that run side by side, a JSON list of jobs: `script`, `args`, files `out` and
`err`, `environment`, `cwd` (null: the server's), and optionally `fault` ("module:attribute", n, signal), which lets the
n-th call of a function send the process that signal (of "SIGINT,SIGINT" the second one while the first is dealt with),
and `limit`, the largest size of a file in bytes. Answers with two lines: the process ids at once, the exit codes
(negative: the signal that killed it) at the end.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LONGEST = 180
"""Seconds after which a job is killed, by SIGALRM."""


def preload() -> None:
    import matplotlib.pyplot as plt  # noqa: F401
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel  # noqa: F401

    import train  # noqa: F401

    torch.set_num_threads(1)


def install_fault(target: str, number: int, name: str) -> None:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, attribute), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            send(name.split(","))
        return original(*args, **kwargs)

    setattr(owner, attribute, faulty)


def send(names: list[str]) -> None:
    try:
        os.kill(os.getpid(), signal.Signals[names[0]])
    finally:
        if names[1:]:
            send(names[1:])


def child(job: dict[str, Any]) -> int:
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
    signal.alarm(LONGEST)
    os.environ.update(job["environment"])
    os.chdir(job["cwd"] or ".")
    if job["fault"]:
        install_fault(*job["fault"])
    if job["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    sys.argv = [job["script"], *job["args"]]
    try:
        runpy.run_path(str(ROOT / job["script"]), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - shown as the interpreter would
        traceback.print_exc()
        return 1
    return 0


def start(job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = child(job)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return pid


def main() -> None:
    sys.path.insert(0, str(ROOT))
    preload()
    for line in sys.stdin:
        pids = [start(job) for job in json.loads(line)]
        print(*pids, flush=True)
        print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), flush=True)


if __name__ == "__main__":
    main()
