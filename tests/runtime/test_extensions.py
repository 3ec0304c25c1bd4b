from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.metrics.base import METRICS
from tcaq_lightning.runtime.extensions import load_extensions


def test_a_file_and_a_module_are_imported_once(tmp_path: Path) -> None:
    counter = tmp_path / "loads"
    file = tmp_path / "mine.py"
    file.write_text(f"from pathlib import Path\nwith Path({str(counter)!r}).open('a') as f:\n    f.write('x')\n")
    digests = load_extensions([str(file), "json", str(file)])
    assert digests[str(file)] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert digests == load_extensions([str(file), "json"])
    assert counter.read_text() == "x"


def test_what_it_defines_is_registered(tmp_path: Path) -> None:
    file = tmp_path / "metric.py"
    file.write_text(
        "from tcaq_lightning.evaluation.metrics.base import METRICS\n\n\n"
        '@METRICS.register("of_a_stranger")\nclass Mine:\n    pass\n'
    )
    load_extensions([str(file)])
    found = METRICS["of_a_stranger"]
    assert sys.modules[found.__module__].__file__ == str(file)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.py", None, "expected a Python file or the name of a module"),
        ("broken.py", "def", "SyntaxError"),
        ("failing.py", "raise ValueError('no luck')", "ValueError: no luck"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    for _ in range(2):  # nothing half imported stays
        with pytest.raises(UserError, match=words) as caught:
            load_extensions(["json", str(file)])
        assert str(caught.value).startswith("extensions[1]: ")
        assert str(file) in str(caught.value)


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"extensions\[0\]: no\.such\.module cannot be imported: ModuleNotFoundError"):
        load_extensions(["no.such.module"])
