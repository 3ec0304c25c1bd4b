"""Reading one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def read_ahead(read: Callable[[Key], Value], keys: Iterable[Key]) -> Generator[Value, None, None]:
    """Yield read(key) for each key in turn; while the caller works on one, a thread reads the next.

    An error in `read` is raised in the caller, in place of the value.

    >>> list(read_ahead(abs, [-1, 2]))
    [1, 2]
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as executor:
        coming = None
        for key in keys:
            present, coming = coming, executor.submit(read, key)
            if present is not None:
                yield present.result()
        if coming is not None:
            yield coming.result()
