"""The example of docs/extending.md: a backend in a file outside of the package."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from tcaq_lightning import load_quantized
from tcaq_lightning.__main__ import main
from tcaq_lightning.backends.base import layer_kernels
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation import latency
from tcaq_lightning.evaluation.latency import backends
from tcaq_lightning.reports.html import command
from tcaq_lightning.runtime.extensions import load_extensions
from tests.backends.conftest import artifact  # noqa: F401 - a fixture

EXAMPLE = Path(__file__).parents[2] / "docs" / "extending" / "backend.py"


def test_a_backend_of_ones_own_opens_an_artifact(artifact: Path) -> None:  # noqa: F811 - the fixture
    load_extensions([str(EXAMPLE)])
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 70])
    simulated = load_quantized(artifact).unet(x, t).sample
    all_layers = load_quantized(artifact, backend="weight_only").unet(x, t).sample
    one_layer = load_quantized(artifact, backend="weight_only", layers="conv_in").unet(x, t).sample
    assert torch.equal(load_quantized(artifact, backend="weight_only", layers="none").unet(x, t).sample, simulated)
    assert not torch.equal(one_layer, simulated)
    assert not torch.equal(one_layer, all_layers)
    reasons = {kernel.reason for kernel in layer_kernels(load_quantized(artifact).unet, "weight_only")}
    assert reasons == {"its input stays in full precision"}
    assert "weight_only" in backends()
    with pytest.raises(UserError, match="packed: backend 'weight_only' has no such option; it has layers"):
        load_quantized(artifact, backend="weight_only", packed=False)


def test_the_commands_know_it(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    extensions = ["--extensions", str(EXAMPLE)]
    sample = ["sample", str(artifact), "--num", "1", "--num_steps", "2", "--output", str(tmp_path / "image.png")]
    assert main([*sample, "--backend", "weight_only", *extensions]) == 0
    assert (tmp_path / "image.png").is_file()
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    job = {"model": "quantized", "backend": "weight_only", "path": str(artifact), "threads": torch.get_num_threads()}
    answers = io.StringIO()
    assert latency.main([json.dumps({**job, "extensions": [str(EXAMPLE)]})], answers) == 0
    assert len(answers.getvalue().splitlines()) == 2


def test_its_latency_is_measured(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, list[str]]] = []

    class Worker(latency.Worker):
        """Starts no process."""

        def __init__(self, model: str, backend: str, path: str, threads: int, extensions: list[str]) -> None:
            started.append((backend, extensions))
            self.model, self.backend, self.problem, self.idle = model, backend, None, 1

        def __enter__(self) -> Worker:
            return self

        def __exit__(self, *_: object) -> None: ...

        def ask(self, batch: int) -> dict[str, object]:
            return {"seconds": [0.25], "peak": 2}

    monkeypatch.setattr(latency, "Worker", Worker)
    monkeypatch.setattr(command, "write_page", lambda *_: None)
    assert main(["report", str(run_dir), "--latency", "1", "--extensions", str(EXAMPLE)]) == 0
    assert ("weight_only", [str(EXAMPLE)]) in started
    measured = latency.measured_latency(run_dir)
    assert measured is not None
    assert "weight_only" in {row["backend"] for row in measured["rows"]}
