from __future__ import annotations

from typing import Any

import pytest

from tcaq_lightning.runtime.json_shape import FLAG, MEASURED, NUMBER, TEXT, Named, Optional, check_shape

SHAPE = {"n": NUMBER, "list": [{"t": TEXT}], "any": Named(FLAG), "maybe": Optional([NUMBER]), "m": MEASURED}
GOOD: dict[str, Any] = {"n": 1.5, "list": [{"t": "x", "more": 0}], "any": {"a": True}, "maybe": None}


def test_what_fits_passes() -> None:
    check_shape(GOOD, SHAPE, "it")
    check_shape({**GOOD, "maybe": [1, 2], "m": 3, "list": [], "any": {}}, SHAPE, "it")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n": "1"}, "expected a number in it.n, got '1'"),
        ({"n": True}, "expected a number in it.n, got True"),
        ({"n": None}, "expected a number in it.n, got None"),
        ({"list": {}}, "expected an array in it.list, got {}"),
        ({"list": [{"t": "x"}, {}]}, r"expected a key t in it.list\[1\], got none"),
        ({"list": [3]}, r"expected an object in it.list\[0\], got 3"),
        ({"any": {"a": 1}}, "expected true or false in it.any.a, got 1"),
        ({"any": []}, "expected an object in it.any"),
        ({"maybe": [1, None]}, r"expected a number in it.maybe\[1\]"),
        ({"m": "x" * 500}, r"got 'x{56}\.\.\.$"),
    ],
)
def test_the_first_difference_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_shape({**GOOD, **change}, SHAPE, "it")
