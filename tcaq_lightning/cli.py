"""Exit codes of the commands: what a user gets to see when something goes wrong."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from tcaq_lightning.errors import UserError
from tcaq_lightning.memory import reuse_freed_memory

EXIT_USER_ERROR = 2
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

    Args:
        function: the command; None stands for success.

    Returns:
        0 or what the command returns; 2 after one line on stderr for a user's mistake, a wrong argument or a file
        system that is full or closed; 130 after Ctrl-C, 143 after SIGTERM. Faults of the program propagate.

    >>> run_cli(lambda: None)
    0
    """
    reuse_freed_memory()
    try:
        with _sigterm_exits(), _quiet_threads():
            return function() or 0
    except (UserError, argparse.ArgumentError) as error:
        return _complain(str(error))
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        where = error.filename2 or error.filename or "a file of this command"
        return _complain(f"cannot read or write {where}: {error.strerror}; free space, or choose a path you may use")
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as end:
        # Lightning turns Ctrl-C within a fit into exit(1).
        if isinstance(end.__context__, KeyboardInterrupt):
            return EXIT_INTERRUPTED
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        return _complain(str(end.code))


def _complain(message: str) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return EXIT_USER_ERROR


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
def _sigterm_exits() -> Iterator[None]:
    """Let SIGTERM raise SystemExit(143), so that files and processes are cleaned up; a repeated one is ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
