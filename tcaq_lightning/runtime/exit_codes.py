"""Exit codes of the commands: what a user gets to see when something goes wrong."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from tcaq_lightning.errors import RankLostError, UserError
from tcaq_lightning.runtime.distributed.environment import started_rank
from tcaq_lightning.runtime.memory import reuse_freed_memory

EXIT_USER_ERROR = 2
EXIT_RANK_LOST = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

ENVIRONMENT_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
"""Failures of the file system that the user can mend; others are faults and keep their traceback."""


def run_cli(function: Callable[[], int | None]) -> int:
    """Run a command and turn what ends it into an exit code.

    Of several processes that torchrun, SLURM or the command itself started, only the first one complains.

    Args:
        function: the command; None stands for success.

    Returns:
        0 or what the command returns; 2 after one line on stderr for a user's mistake, a wrong argument or a file
        system that is full or closed; 75 after one line when another process of the run is lost; 130 after Ctrl-C, 143
        after SIGTERM. Faults of the program propagate.

    >>> run_cli(lambda: None)
    0
    """
    reuse_freed_memory()
    try:
        with _signals_exit(), _quiet_threads():
            return function() or 0
    except BaseException as error:
        found = ending(error)
        if found is None:
            raise
        code, message = found
        if message and (started_rank() == 0 or isinstance(error, RankLostError)):
            sys.stderr.write(f"error: {' '.join(message.split())}\n")
        return code


def ending(error: BaseException) -> tuple[int, str] | None:
    """Exit code, and message or "", of a command that `error` ended; None for a fault of the program.

    >>> ending(UserError("seed must be 0"))
    (2, 'seed must be 0')
    """
    if isinstance(error, (UserError, argparse.ArgumentError)):
        return EXIT_USER_ERROR, str(error)
    if isinstance(error, RankLostError):
        return EXIT_RANK_LOST, str(error)
    if isinstance(error, OSError) and error.errno in ENVIRONMENT_ERRORS:
        where = error.filename2 or error.filename or "a file of this command"
        return (
            EXIT_USER_ERROR,
            f"cannot read or write {where}: {error.strerror}; free space, or choose a path you may use",
        )
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, ""
    if isinstance(error, SystemExit):
        # Lightning turns Ctrl-C within a fit into exit(1).
        if isinstance(error.__context__, KeyboardInterrupt):
            return EXIT_INTERRUPTED, ""
        if error.code is None or isinstance(error.code, int):
            return error.code or 0, ""
        return EXIT_USER_ERROR, str(error.code)
    return None


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """No traceback from a thread that could not write: TensorBoard's raises the same error in the main thread again."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in ENVIRONMENT_ERRORS):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def _signals_exit() -> Iterator[None]:
    """Let SIGTERM raise SystemExit(143), so that files and processes are cleaned up; a repeated one is ignored.

    Within a SLURM job the same holds for SIGUSR1, which `#SBATCH --signal=USR1@90` sends ahead of the time limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(EXIT_TERMINATED)

    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
