from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tcaq_lightning.artifact import load_quantized
from tcaq_lightning.errors import UserError
from tcaq_lightning.pipelines import find_denoiser
from tcaq_lightning.run_report import latency
from tcaq_lightning.run_report.latency import backends, measure_calls, measure_latency, measured_latency


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "LEAST_SECONDS", 0.0)


@pytest.fixture
def config(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "manifest.json").read_text())["config"]
    return content


def test_the_median_of_the_calls_is_between_fastest_and_slowest(
    run_dir: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that says how long each call took."""
    ticks = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0, 30.0, 34.0, 40.0, 43.0] + [0.0] * 100)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))
    shapes: list[tuple[int, ...]] = []

    def open_model() -> Any:
        denoiser = find_denoiser(load_quantized(run_dir / "quantized"))[1]
        denoiser.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
        return denoiser

    rows = measure_calls(open_model, [1, 3])
    assert [row["batch"] for row in rows] == [1, 3]
    assert (rows[0]["seconds"], rows[0]["fastest"], rows[0]["slowest"], rows[0]["calls"]) == (3.0, 1.0, 5.0, 5)
    assert shapes == [(1, 1, 8, 8)] * 7 + [(3, 1, 8, 8)] * 7
    assert rows[0]["idle"] <= rows[0]["peak"] <= rows[1]["peak"]


def test_every_backend_computes_what_the_artifact_does(run_dir: Path) -> None:
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(50)
    expected = find_denoiser(load_quantized(run_dir / "quantized"))[1](x, t, return_dict=False)[0]
    for open_model in backends().values():
        assert torch.equal(open_model(str(run_dir / "quantized"))(x, t, return_dict=False)[0], expected)


def test_rows_of_all_models_are_kept_and_problems_told(
    run_dir: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"batch": 1, "seconds": 0.5, "fastest": 0.4, "slowest": 0.6, "calls": 5, "peak": 3, "idle": 1}
    jobs = []

    def in_own_process(job: dict[str, Any]) -> list[dict[str, Any]]:
        jobs.append(job)
        return [{"problem": "not installed"}] if job["backend"] == "other" else [row]

    monkeypatch.setattr(latency, "_in_own_process", in_own_process)
    monkeypatch.setattr(latency, "backends", lambda: {"torch": None, "other": None})
    content = measure_latency(run_dir, config, [8, 1], threads=1)
    assert [(j["model"], j["backend"], j["batches"]) for j in jobs] == [
        ("full precision", "torch", [1, 8]),
        ("quantized", "torch", [1, 8]),
        ("quantized", "other", [1, 8]),
    ]
    assert content["rows"][2] == {"model": "quantized", "backend": "other", "problem": "not installed"}
    assert content["rows"][1] == {"model": "quantized", "backend": "torch", **row}
    assert measured_latency(run_dir) == content
    (run_dir / "quantized" / "checksums.json").write_text("{}")
    assert measured_latency(run_dir) is None


def test_a_process_that_fails_says_why_in_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = {"model": "quantized", "backend": "torch", "path": "/nowhere", "batches": [1], "threads": 1}
    threads = torch.get_num_threads()
    assert latency.main([json.dumps(job)]) == 2
    torch.set_num_threads(threads)
    assert capsys.readouterr().err.startswith("error: /nowhere: no such directory")


def test_a_run_without_its_artifact_is_refused(run_dir: Path, config: dict[str, Any]) -> None:
    (run_dir / "quantized" / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"checksums\.json is missing: expected the artifact"):
        measure_latency(run_dir, config, [1])


@pytest.mark.slow
def test_models_are_measured_in_processes_of_their_own(run_dir: Path, config: dict[str, Any]) -> None:
    content = measure_latency(run_dir, config, [1, 2], threads=1)
    assert [(r["model"], r["backend"], r["batch"]) for r in content["rows"]] == [
        (model, "torch", batch) for model in ("full precision", "quantized") for batch in (1, 2)
    ]
    for row in content["rows"]:
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["calls"] >= latency.LEAST_CALLS
        assert row["peak"] > row["idle"] > 50e6
