from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tcaq_lightning.calibration.run_dir import sealed
from tcaq_lightning.errors import UserError
from tcaq_lightning.reports.finished_run import read_finished
from tcaq_lightning.reports.html.calibration_sections import channel_spread, magnitudes


def change(path: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_finished_run_is_read_with_its_statistics(run_dir: Path) -> None:
    run = read_finished(run_dir)
    assert run.notes == []
    assert list(run.statistics) == run.manifest["units"]
    assert run.manifest["versions"]["torch"] == torch.__version__
    attention = next(s for name, s in run.statistics.items() if "attentions" in name)
    (counts,) = attention.counts.values()
    assert attention.edges is not None
    assert counts.shape == (2, len(attention.edges) - 1)
    assert int(counts.sum()) > 0
    assert [fit.kind for fit in attention.fits["processor.probabilities"]]
    # r and shift are those of the unit's finished state.
    before, after = magnitudes(attention)["to_q.input_quantizer"]
    ranges, r = attention.ranges["to_q.input_quantizer"], attention.r["to_q.input_quantizer"]
    shift = attention.shift["to_q.input_quantizer"]
    assert shift is not None
    assert torch.equal(before, torch.maximum(ranges.low.abs(), ranges.high.abs()))
    expected = torch.maximum((ranges.low - shift).abs(), (ranges.high - shift).abs()) / r
    torch.testing.assert_close(after, expected)
    spread = channel_spread(before)
    assert spread is not None
    assert spread >= 1


def test_no_run_and_an_unfinished_one_are_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere holds no run: expected the run_dir of train\.py"):
        read_finished(tmp_path / "nowhere")
    file = run_dir / "manifest.json"
    change(file, lambda m: m.pop("finished"))
    file.write_text(json.dumps(sealed(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=r"run is not finished: .*train\.py --config"):
        read_finished(run_dir)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"config": {}}'])
@pytest.mark.parametrize("name", ["manifest.json", "metrics.json"])
def test_damaged_files_are_named(name: str, content: bytes, run_dir: Path) -> None:
    (run_dir / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(run_dir / name))} is damaged: expected") as caught:
        read_finished(run_dir)
    assert "\n" not in str(caught.value)


def test_a_changed_configuration_is_noticed(run_dir: Path) -> None:
    change(run_dir / "manifest.json", lambda m: m["config"].update(seed=7))
    with pytest.raises(UserError, match="checksum does not fit its content"):
        read_finished(run_dir)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda m: m.pop("units"), "a key units"),
        (lambda m: m["units"][3].update(before="x"), r"a number in it.units\[3\].before, got 'x'"),
        (lambda m: m["noise_error"]["relative"].pop(), "lists of one length in noise_error"),
        (lambda m: m["rounds"][1]["mismatch"].append(1.0), "lists of one length in rounds"),
        (lambda m: m["coverage"][0].update(bits=4), r"a text in it.coverage\[0\].bits"),
        (lambda m: m["stages"].update(observe=float("nan")), "NaN"),
        (lambda m: m["bytes"].update(full=None), "a number in it.bytes.full"),
        (lambda m: m.update(scores={"full": {"fid": {"mean": 1.0}}}), "the figures of fid, got"),
    ],
)
def test_metrics_of_another_shape_are_refused(edit: Callable[[Any], None], text: str, run_dir: Path) -> None:
    change(run_dir / "metrics.json", edit)
    with pytest.raises(
        UserError, match=rf"metrics\.json is damaged: expected what the run wrote, got ValueError.*{text}"
    ):
        read_finished(run_dir)


def test_fid_of_earlier_versions_joins_the_other_scores(run_dir: Path) -> None:
    distance = {"value": 8.0, "low": None, "high": None, "num_samples": 10}
    change(run_dir / "metrics.json", lambda m: m.update(fid={"full": distance, "quantized": None}))
    assert read_finished(run_dir).metrics["scores"]["full"] == {"fid": distance}


def test_missing_metrics_are_named(run_dir: Path) -> None:
    (run_dir / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json is missing"):
        read_finished(run_dir)


def test_damaged_statistics_are_left_out_with_a_note(run_dir: Path) -> None:
    files = sorted((run_dir / "rounds" / "00" / "statistics").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-7])
    files[1].unlink()
    states = sorted((run_dir / "rounds" / "00" / "units").iterdir())
    states[2].unlink()
    run = read_finished(run_dir)
    assert len(run.statistics) == len(run.manifest["units"]) - 3
    assert len(run.notes) == 2
    assert files[0].name in run.notes[0]
    assert files[2].name in run.notes[1]
