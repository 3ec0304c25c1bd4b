from __future__ import annotations

import pytest

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.registry import Registry


def make(name: str = "Part") -> type:
    return type(name, (), {})


def test_unknown_names_say_what_is_near() -> None:
    registry = Registry[type]("metric")
    registry.register("fid")(make())
    registry.register("kid")(make())
    with pytest.raises(UserError, match="unknown metric 'fed'; expected one of fid, kid, such as fid"):
        registry["fed"]


def test_an_empty_registry_has_nothing_near() -> None:
    with pytest.raises(UserError, match="unknown backend 'x'"):
        Registry[type]("backend")["x"]


def test_two_parts_of_one_name_are_refused() -> None:
    registry = Registry[type]("metric")
    registry.register("fid")(make("First"))
    with pytest.raises(ValueError, match="metric 'fid' is registered already"):
        registry.register("fid")(make("Second"))


def test_a_module_that_is_imported_again_replaces_its_part() -> None:
    registry = Registry[type]("metric")
    first, again = make(), make()
    registry.register("fid")(first)
    registry.register("fid")(again)
    assert registry["fid"] is again
    assert ("fid" in registry, "kid" in registry, registry.items()) == (True, False, [("fid", again)])
