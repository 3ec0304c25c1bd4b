from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tcaq_lightning.errors import UserError
from tcaq_lightning.reports.comparison.rows import Compared, Row, compare_rows
from tcaq_lightning.reports.comparison.tables import FIRST, cells, differences, header
from tcaq_lightning.reports.finished_run import FinishedRun


def made(name: str, scale: float = 1.0, **config: Any) -> FinishedRun:
    """A finished run whose errors are `scale` times the same ones."""
    noise, images = [0.1, 0.3, 0.2], [0.01, 0.05, 0.03, 0.02]
    settings = {
        "model": {"path": "a", "variant": None},
        "seed": 0,
        "conditioning": {"prompts": None},
        "calibration": {"sampler": {"num_steps": 2}, "num_trajectories": 4},
        "evaluation": {"num_trajectories": 3, "num_images": 4, "sampler": None, "fid_samples": 0, "features": "f"},
        "trainer": {"threads": 1},
        "run_dir": name,
        **config,
    }
    metrics = {
        "noise_error": {
            "summary": 0.2 * scale,
            "by_trajectory": [scale * e for e in noise],
            "timesteps": [500.0, 0.0],
            "relative": [0.2 * scale, 0.4 * scale],
            "bias": [0.0, 0.0],
        },
        "same_noise": {"mse": 0.0275 * scale, "by_image": [scale * e for e in images], "psnr": 20.0},
        "scores": {},
        "bytes": {"full": 800, "quantized": 100},
        "stages": {"learn": 2.0, "gate": 1.0},
    }
    return FinishedRun(Path(name), {"config": settings}, metrics)


def compared(*runs: tuple[str, str, FinishedRun]) -> list[Compared]:
    return compare_rows([Row(*run) for run in runs])


def test_each_row_is_held_against_the_first_of_its_bits() -> None:
    found = compared(
        ("nearest", "w8a8", made("a")),
        ("ours", "w8a8", made("b", 0.5)),
        ("nearest", "w4a4", made("c", 10)),
        ("ours", "w4a4", made("d", 20)),
    )
    assert [c.noise.to_first is None for c in found] == [True, False, True, False]
    ours = found[1].noise
    assert ours.to_first is not None
    assert (ours.to_first.ratio, ours.to_first.better) == (pytest.approx(0.5), "yes")
    assert found[3].to_dict()["image_mse"]["better_than_first"] == "no"
    assert found[3].to_dict()["image_mse"]["to_first"]["ratio"] == pytest.approx(2)


def test_table_has_a_line_for_each_row() -> None:
    found = compared(("nearest", "w4a4", made("a")), ("ours", "w4a4", made("b", 0.5)))
    lines = cells(found)
    assert [len(line) for line in lines] == [len(header(found))] * 2
    assert lines[0][:5] == ["nearest", "W4A4", "0.2 [0.1, 0.3]", "-", FIRST]
    assert lines[1][3:5] == ["0.500 [0.500, 0.500]", "yes"]
    assert lines[1][-3:] == ["0.000", "3", "-"]


def test_settings_that_differ_are_named() -> None:
    other = made("b", calibration={"sampler": {"num_steps": 2}, "num_trajectories": 8}, trainer={"threads": 2})
    found = compared(("nearest", "w4a4", made("a")), ("ours", "w4a4", other))
    assert differences(found) == [["ours", "W4A4", "calibration.num_trajectories: 8"]]


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("model.path", {"model": {"path": "b", "variant": None}}),
        ("seed", {"seed": 1}),
        ("calibration.sampler", {"calibration": {"sampler": {"num_steps": 3}}}),
        ("evaluation.num_images", {"evaluation": {"num_images": 5, "num_trajectories": 3}}),
    ],
)
def test_runs_of_other_samples_are_refused(key: str, changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^b: {key} is .* in a; only runs of one model"):
        compared(("nearest", "w4a4", made("a")), ("ours", "w4a4", made("b", **changed)))


def test_runs_of_earlier_versions_have_no_interval() -> None:
    old = copy.deepcopy(made("b", 0.5))
    del old.metrics["noise_error"]["by_trajectory"]
    old.metrics["same_noise"]["by_image"] = [0.1, None, 0.2, 0.3]
    found = compared(("nearest", "w4a4", made("a")), ("ours", "w4a4", old))[1]
    assert found.noise.to_dict() == {
        "value": 0.1,
        "interval": None,
        "to_first": None,
        "better_than_first": None,
    }
    assert found.images.to_first is None


def test_a_run_without_images_is_refused() -> None:
    other = made("b")
    other.metrics["same_noise"] = None
    with pytest.raises(UserError, match=r"^b has no noise error or images"):
        compared(("nearest", "w4a4", made("a")), ("ours", "w4a4", other))
