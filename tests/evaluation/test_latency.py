from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation import latency
from tcaq_lightning.evaluation.latency import backends, measure_latency, measured_latency
from tcaq_lightning.models.pipelines import find_denoiser


@pytest.fixture
def config(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "manifest.json").read_text())["config"]
    return content


def test_a_spell_is_timed_after_warming_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says how long each call took."""
    ticks = iter([0.0, 0.125, 10.0, 10.25, 20.0, 20.125])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))
    shapes: list[tuple[int, ...]] = []
    denoiser = find_denoiser(load_quantized(run_dir / "quantized"))[1]
    denoiser.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    assert latency.timed_calls(denoiser, 3) == [0.125, 0.25, 0.125]
    assert shapes == [(3, 1, 8, 8)] * (latency.WARM_UP + 3)


class FakeWorker:
    """Answers with given spells, then has a problem."""

    asked: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, model: str, backend: str, path: str, threads: int, extensions: list[str]) -> None:
        assert extensions == ["mine.py"]
        self.model, self.backend, self.path, self.threads = model, backend, path, threads
        self.problem, self.idle = ("not installed" if backend == "other" else None), 1
        self.left = 7 if backend == "short" else 100

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, batch: int) -> dict[str, Any] | None:
        self.left -= 1
        if self.left < 0:
            self.problem = "killed"
        if self.problem is not None:
            return None
        self.asked.append((self.backend, batch))
        return {"seconds": [0.5 * batch, 0.25 * batch, 4.0 * batch], "peak": 100 * batch}


def test_every_backend_computes_what_the_artifact_does(run_dir: Path) -> None:
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(50)
    expected = find_denoiser(load_quantized(run_dir / "quantized"))[1](x, t, return_dict=False)[0]
    assert set(backends()) >= {"torch", "openvino", "onnxruntime"}
    assert "torchao" not in backends()  # made for GPUs
    for name in ("torch", "openvino", "onnxruntime"):
        open_model = backends()[name]
        got = open_model(str(run_dir / "quantized"))(x, t, return_dict=False)[0]
        if name == "torch":
            assert torch.equal(got, expected)
        else:  # another order of float sums: some values fall on the other side of a code's edge
            assert (got - expected).square().sum() < 1e-3 * expected.square().sum()


def test_models_take_turns_and_problems_are_told(
    run_dir: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "Worker", FakeWorker)
    monkeypatch.setattr(latency, "backends", lambda: dict.fromkeys(("torch", "other", "short")))
    FakeWorker.asked.clear()
    content = measure_latency(run_dir, config, [8, 1, 8], threads=1, extensions=["mine.py"])
    turns = latency.TURNS
    assert FakeWorker.asked[: 3 * turns] == [("torch", 1), ("torch", 1), ("short", 1)] * turns
    assert FakeWorker.asked[3 * turns :][:4] == [("torch", 8), ("torch", 8), ("short", 8), ("torch", 8)]
    row = {"peak": 100, "idle": 1, "batch": 1, "seconds": 0.5, "fastest": 0.25, "slowest": 4.0, "calls": 3 * turns}
    large = {**row, "peak": 800, "batch": 8, "seconds": 4.0, "fastest": 2.0, "slowest": 32.0}
    assert content["rows"] == [
        {"model": "full precision", "backend": "torch", **row},
        {"model": "full precision", "backend": "torch", **large},
        {"model": "quantized", "backend": "torch", **row},
        {"model": "quantized", "backend": "torch", **large},
        {"model": "quantized", "backend": "other", "problem": "not installed"},
        {"model": "quantized", "backend": "short", **row},
        {"model": "quantized", "backend": "short", **large, "calls": 3 * (7 - turns)},
        {"model": "quantized", "backend": "short", "problem": "killed"},
    ]
    assert measured_latency(run_dir) == content
    (run_dir / "quantized" / "checksums.json").write_text("{}")
    assert measured_latency(run_dir) is None


def test_a_process_answers_line_by_line(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\n"))
    job = {"model": "quantized", "backend": "torch", "path": str(run_dir / "quantized"), "extensions": []}
    assert latency.main([json.dumps({**job, "threads": torch.get_num_threads()})], answers) == 0
    ready, *spells = map(json.loads, answers.getvalue().splitlines())
    assert len(spells) == 2
    assert all(len(spell["seconds"]) >= latency.LEAST_CALLS for spell in spells)
    assert ready["idle"] <= spells[0]["peak"] <= spells[1]["peak"]


def test_a_process_that_fails_says_why_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    job = {
        "model": "quantized",
        "backend": "torch",
        "path": "/nowhere",
        "threads": torch.get_num_threads(),
        "extensions": [],
    }
    assert latency.main([json.dumps(job)], io.StringIO()) == 2
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
        assert row["calls"] >= latency.LEAST_CALLS * latency.TURNS
        assert row["peak"] > row["idle"] > 50e6
    with latency.Worker("quantized", "torch", "/nowhere", 1) as worker:
        assert worker.ask(1) is None
        assert worker.problem is not None
        assert worker.problem.startswith("/nowhere: no such directory")
