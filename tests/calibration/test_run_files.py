from __future__ import annotations

from pathlib import Path

import pytest

from tcaq_lightning.calibration.run_files import check_places
from tcaq_lightning.errors import UserError


@pytest.mark.parametrize("name", ["plots", "samples", "evaluation", "quantized", "tensorboard", "rounds/00/units"])
def test_a_file_in_the_place_of_a_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("in the way")
    with pytest.raises(UserError, match=f"run_dir: expected a directory at .*{name}"):
        check_places(tmp_path)


@pytest.mark.parametrize("name", ["report.md", "metrics.json", "plots/mismatch.png"])
def test_a_directory_in_the_place_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"run_dir: expected a file at .*{name}"):
        check_places(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    check_places(tmp_path / "new")
