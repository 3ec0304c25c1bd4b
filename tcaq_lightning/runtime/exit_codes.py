"""Exit codes of the commands, and the line that a user sees when something goes wrong."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from tcaq_lightning.errors import RankLostError, UserError
from tcaq_lightning.runtime.distributed.environment import started_rank
from tcaq_lightning.runtime.memory import is_out_of_memory, out_of_memory_message, reuse_freed_memory

EXIT_USER_ERROR = 2
EXIT_RANK_LOST = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed
EXIT_INTERRUPTED = 130
EXIT_CLOSED = 141
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
    errno.ELOOP,
    errno.EROFS,
    errno.ENOTEMPTY,
    errno.EMFILE,
    errno.ENFILE,
}
"""Failures of the file system that the user can repair; others are bugs and keep their traceback."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY}
TOO_MANY = {errno.EMFILE, errno.ENFILE}


def run_cli(function: Callable[[], int | None]) -> int:
    """Run a command and turn what ends it into an exit code.

    If torchrun, SLURM or the command itself started several processes, only the first one prints the line.

    Args:
        function: the command; None stands for success.

    Returns:
        0 or what the command returns; 2 after one line on stderr for a user's mistake, a wrong argument, a full or
        read-only file system, or exhausted memory; 75 after one line when another process of the run is lost; 130
        after Ctrl-C, 141 when the reader of the output is gone, 143 after SIGTERM. Bugs of the program propagate.

    >>> run_cli(lambda: None)
    0
    """
    reuse_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    try:
        with _signals_exit(), _quiet_threads():
            code = function() or 0
            sys.stdout.flush()
            return code
    except BaseException as error:
        found = ending(error)
        if found is None:
            raise
        code, message = found
        if code == EXIT_CLOSED:
            _drop_output()
        if message and (started_rank() == 0 or isinstance(error, RankLostError)):
            sys.stderr.write(f"error: {printable(message)}\n")
        return code


def printable(message: str) -> str:
    r"""A message in one line, without characters that a terminal would obey.

    >>> printable("a\nb \x1b[2J")
    'a b \\x1b[2J'
    """
    joined = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


def ending(error: BaseException) -> tuple[int, str] | None:
    """Exit code, and message or "", of a command that `error` ended; None for a bug of the program.

    >>> ending(UserError("seed must be 0"))
    (2, 'seed must be 0')
    """
    if isinstance(error, (UserError, argparse.ArgumentError)):
        return EXIT_USER_ERROR, str(error)
    if isinstance(error, RankLostError):
        return EXIT_RANK_LOST, str(error)
    # rich turns a closed pipe into exit(1), Lightning Ctrl-C within a fit.
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, BrokenPipeError):
        return EXIT_CLOSED, "nobody reads what this command prints, so it has ended; the same command again goes on"
    if isinstance(error, OSError) and error.errno in ENVIRONMENT_ERRORS:
        where = error.filename2 or error.filename or "a file of this command"
        return EXIT_USER_ERROR, f"cannot read or write {where}: {error.strerror}; {_advice(error.errno)}"
    if is_out_of_memory(error):
        return EXIT_USER_ERROR, out_of_memory_message(error)
    if isinstance(cause, KeyboardInterrupt):
        return EXIT_INTERRUPTED, ""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0, ""
        return EXIT_USER_ERROR, str(error.code)
    return None


def _advice(number: int | None) -> str:
    """How to repair a failure of the file system."""
    if number in FULL:
        return "free space, or choose a path where there is some"
    if number in IN_THE_WAY:
        return "something else is in its place: remove that, or choose another path"
    if number in TOO_MANY:
        return "raise the number of open files (ulimit -n)"
    return "choose a path that exists and that you may use"


def _drop_output() -> None:
    """Discard what is still to be printed, so that the interpreter does not complain when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


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
    Ctrl-C raises KeyboardInterrupt; a second one ends the process at once, without a traceback, also after the
    command: what is on disk is whole at any time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(EXIT_TERMINATED)

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
        before.pop(signal.SIGINT, None)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, leave) for number in numbers}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
