from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tcaq_lightning.calibration.prefetch import read_ahead


def test_values_come_in_order() -> None:
    assert list(read_ahead(lambda n: n * n, range(5))) == [0, 1, 4, 9, 16]
    assert list(read_ahead(lambda n: n, [])) == []


def test_the_next_value_is_read_while_the_present_one_is_used_and_no_further() -> None:
    begun = [threading.Event() for _ in range(4)]

    def read(n: int) -> int:
        begun[n].set()
        return n

    values = read_ahead(read, range(4))
    assert next(values) == 0
    assert begun[1].wait(5)
    assert not begun[2].wait(0.05)
    assert next(values) == 1
    assert begun[2].wait(5)
    assert list(values) == [2, 3]


def test_keys_are_drawn_one_ahead() -> None:
    drawn: list[int] = []

    def keys() -> Iterator[int]:
        for n in range(4):
            drawn.append(n)
            yield n

    values = read_ahead(abs, keys())
    next(values)
    assert drawn == [0, 1]
    values.close()


def test_an_error_is_raised_where_its_value_would_have_come() -> None:
    values = read_ahead(lambda n: 1 // n, [1, 0, 1])
    assert next(values) == 1
    with pytest.raises(ZeroDivisionError):
        next(values)


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    values = read_ahead(abs, range(4))
    next(values)
    values.close()
    list(read_ahead(abs, range(4)))
    assert threading.active_count() == before
