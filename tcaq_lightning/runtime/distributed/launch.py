"""The processes of a run: starting them, connecting them, and ending all of them alike when one ends."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from tcaq_lightning.config import Config, TrainerConfig
from tcaq_lightning.errors import RankLostError, UserError
from tcaq_lightning.runtime.distributed.affinity import held_to, own_cores
from tcaq_lightning.runtime.distributed.collectives import memory_shared
from tcaq_lightning.runtime.distributed.environment import Place, find_place
from tcaq_lightning.runtime.exit_codes import EXIT_RANK_LOST, EXIT_USER_ERROR, ending
from tcaq_lightning.runtime.lightning import choose_device

Children: TypeAlias = "Sequence[subprocess.Popen[bytes]]"

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Backends of the process group by the type of the ranks' devices; all but gradients is exchanged from the CPU."""
EXIT_FAULT = 1
"""Exit code of Python after a traceback."""
SHOWN: dict[int, type[Exception]] = {EXIT_USER_ERROR: UserError, EXIT_RANK_LOST: RankLostError}
"""What rank 0 raises for another rank's failure, by exit code, to show its message; others end silently."""
NOTICE = 2.0
"""Seconds within which a rank that fails has told the others why, and within which they have noticed."""
PATIENCE = 10.0
"""Seconds that are waited for processes that have been told to end."""


@contextmanager
def launched(config: Config) -> Iterator[None]:
    """`connected` for a calibration run.

    Args:
        config: `trainer.devices` and `trainer.num_nodes` are set to what torchrun or SLURM started.

    Raises:
        UserError: the configuration does not fit the number of ranks, or another rank met a user's mistake.
        RankLostError: another rank ended without a word, or cannot be reached.
    """
    with connected(config.trainer, config.check_ranks):
        yield


@contextmanager
def connected(trainer: TrainerConfig, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Make this process one of the ranks of a command while the context lasts; `distributed` is how they communicate.

    With trainer.devices above 1 the other processes of this node are started with the command that started this one,
    unless torchrun or SLURM has started them. When one rank fails, all of them end with its exit code.

    Args:
        trainer: `devices` and `num_nodes` are set to what torchrun or SLURM started.
        check: sees that there is work for every rank, once their number is known.

    Raises:
        UserError: from `check`, or another rank met a user's mistake.
        RankLostError: another rank ended without a word, or cannot be reached.
    """
    place = find_place(trainer.devices, trainer.num_nodes)
    trainer.devices, trainer.num_nodes = place.devices, place.num_nodes
    check()
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    if place.ranks == 1:
        yield
        return
    kind = _claim_device(trainer, place)
    if place.rank:
        logging.getLogger("tcaq_lightning").setLevel(logging.ERROR)  # rank 0 warns for all
    timeout = timedelta(minutes=trainer.timeout)
    store, port = _open_store(place, timeout)
    children = [] if place.external else _start_processes(place, port)
    failed = True
    try:
        _meet(store, place, children, timeout)
        group = PrefixStore("group", store)
        dist.init_process_group(BACKENDS[kind], store=group, rank=place.rank, world_size=place.ranks, timeout=timeout)
        cores = own_cores()
        if trainer.threads is None:
            torch.set_num_threads(len(cores) if cores else max(1, (os.cpu_count() or 1) // place.devices))
        with ExitStack() as stack:
            if kind == "cpu" and cores:
                stack.enter_context(held_to(cores))
            if kind == "cpu" and place.num_nodes == 1:
                stack.enter_context(memory_shared(timeout.total_seconds()))
            yield
        failed = False
    except BaseException as error:
        common = _common_end(error, store, place, children)
        if common is error:
            raise
        raise common from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # wakes the ranks that wait for this one
        _part(store, place, children, failed)


def _claim_device(trainer: TrainerConfig, place: Place) -> str:
    """Make the rank's own device the current one; returns its type.

    Raises:
        UserError: there are fewer devices than ranks on this node.
    """
    kind = choose_device(trainer).type
    if kind not in BACKENDS:
        raise UserError(f"trainer.devices must be 1 on a device of type {kind}, got {place.devices}")
    if kind == "cuda":
        if place.devices > torch.cuda.device_count():
            raise UserError(
                f"trainer.devices must be at most the number of GPUs of this node ({torch.cuda.device_count()}), got "
                f"{place.devices}"
            )
        torch.cuda.set_device(place.local_rank)
    return kind


def _open_store(place: Place, timeout: timedelta) -> tuple[Store, int]:
    """The run's key-value store, which rank 0 holds, or torchrun, and its port.

    Raises:
        RankLostError: nobody listens there.
    """
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holder = place.rank == 0 and not of_torchrun
    try:
        store = TCPStore(place.address, place.port, place.ranks, holder, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise RankLostError(
            f"cannot reach rank 0 at {place.address}, port {place.port} ({_one_line(error)}); start the command on "
            "every node, with an address of rank 0 that all of them reach"
        ) from error
    return PrefixStore(f"run/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), store.port


def _start_processes(place: Place, port: int) -> Children:
    """Start the other processes of this node, with the command that started this one."""
    # As a script, a package's __main__ would have the package's own files for top-level modules.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    package = None if spec is None or not spec.name.startswith("tcaq_lightning.") else spec.parent
    started = [str(Path(sys.argv[0]).resolve())] if package is None else ["-m", package]
    command = [sys.executable, *started, *sys.argv[1:]]
    places = [
        Place(place.rank + i, i, place.devices, place.num_nodes, place.address, port) for i in range(1, place.devices)
    ]
    return [subprocess.Popen(command, env={**os.environ, **p.variables()}) for p in places]  # noqa: S603 - as we are


def _meet(store: Store, place: Place, children: Children, timeout: timedelta) -> None:
    """Wait for all ranks here, where signals are handled and the end of a process is seen."""
    deadline = time.monotonic() + timeout.total_seconds()
    present = store.add("present", 1)
    while present < place.ranks:
        if _has_failed(store):
            raise RuntimeError("another rank has failed")
        for child in children:
            if child.poll() is not None:
                raise RankLostError(f"a process of this run ended with exit code {child.returncode} before its start")
        if time.monotonic() > deadline:
            raise RankLostError(
                f"{present} of {place.ranks} processes came within trainer.timeout ({timeout}); expected all of them: "
                "start the command on every node, or raise it"
            )
        time.sleep(0.05)
        present = store.add("present", 0)


def _common_end(error: BaseException, store: Store, place: Place, children: Children) -> BaseException:
    """The exception that ends this rank: its own, or one that stands for what ended another rank before.

    The first failure of a run is posted in its store, where a rank that finds a connection closed looks for the
    reason.
    """
    own, connection_lost = ending(error), False
    if own is None and isinstance(error, RuntimeError):
        connection_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
    store.set_timeout(timedelta(seconds=PATIENCE))
    try:
        with _without_native_traces():
            if connection_lost:
                _await(lambda: _has_failed(store), NOTICE)
                own = EXIT_RANK_LOST, f"{_lost(children)}; the same command goes on from there ({_one_line(error)})"
            store.compare_set("failure", "", json.dumps([place.rank, *(own or (EXIT_FAULT, ""))]))
            source, code, message = json.loads(store.get("failure"))
    except RuntimeError:
        if connection_lost:
            return RankLostError(
                f"rank 0 of this run is gone; the same command goes on from there ({_one_line(error)})"
            )
        return error
    if source == place.rank and not connection_lost:
        return error
    if place.rank == 0 and code in SHOWN:
        return SHOWN[code](message)
    return SystemExit(code)


def _lost(children: Children) -> str:
    """Which process is gone, as far as its parent knows."""
    for number, child in enumerate(children, start=1):
        if child.poll() is not None and child.returncode < 0:
            return f"process {number} of this node was ended by {signal.Signals(-child.returncode).name}"
    return "another process of this run is gone"


def _one_line(error: BaseException) -> str:
    """The first sentence, without the place in gloo's sources where it happened."""
    return " ".join(re.sub(r"\[[^]\s]+:\d+\]", "", str(error)).split()).split(". ")[0][:200]


def _has_failed(store: Store) -> bool:
    return bool(store.check(["failure"]))


def _await(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition comes true within some time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


def _part(store: Store, place: Place, children: Children, failed: bool) -> None:
    """Check that no process of this node stays behind, and that the others can read why a run has failed."""
    _await(lambda: all(child.poll() is not None for child in children), NOTICE if failed else PATIENCE)
    for child in children:
        child.terminate()
    if not _await(lambda: all(child.poll() is not None for child in children), PATIENCE):
        for child in children:
            child.kill()
    if failed:
        with suppress(RuntimeError), _without_native_traces():  # the store may be gone
            store.add("parted", 1)
            if place.rank == 0 and len(children) < place.ranks - 1:
                _await(lambda: store.add("parted", 0) >= place.ranks, NOTICE)


@contextmanager
def _without_native_traces() -> Iterator[None]:
    """Keep the stack trace off stderr that torch's native code writes for a store that is gone."""
    sys.stderr.flush()
    before, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(null)
