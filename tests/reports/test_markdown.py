from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from tcaq_lightning.calibration.initialize import AttentionChoice
from tcaq_lightning.methods.daq import LogHistogram, TailFit, decide_by_likelihood
from tcaq_lightning.nn.coverage import CoverageRow
from tcaq_lightning.reports.headline import final_table, headline
from tcaq_lightning.reports.markdown import render, write_report

COVERAGE = [
    CoverageRow("conv_in", "Conv2d", "W8 A8", "", 1234),
    CoverageRow("mid.attn (q k^T)", "matmul", "A4 A4", "", 0),
    CoverageRow("norm|odd", "GroupNorm", "float", "normalisation or look-up", 16),
]


def fits(count: int) -> list[TailFit]:
    return decide_by_likelihood(LogHistogram(num_groups=count))


def choice() -> AttentionChoice:
    return AttentionChoice(
        torch.tensor([True, False, True]),
        torch.tensor([False, False, True]),
        torch.tensor([True, False, True]),
        torch.tensor([0.3, 0.1, 0.2]),
        torch.tensor([0.1, 0.4, 0.1]),
        fits(3),
    )


def metrics() -> dict[str, Any]:
    fid = {"value": 12.3456, "low": 11.0, "high": 13.5, "num_samples": 5000}
    return {
        "noise_error": {
            "summary": 0.0123,
            "timesteps": [950.0, 475.0, 0.0],
            "relative": [0.001, 0.02, 0.5],
            "bias": [0.01, -0.02, 0.0],
        },
        "same_noise": {
            "mse": 0.0456,
            "mse_median": 0.0321,
            "mse_worst": 0.5,
            "psnr": 23.45,
            "psnr_median": 24.5,
            "psnr_worst": 12.25,
            "mse_unclipped": 19.75,
            "num_images": 64,
        },
        "scores": {"full": {"fid": {**fid, "value": 9.8765}}, "quantized": {"fid": fid}},
        "bytes": {"full": 4_000_000, "quantized": 1_000_000},
    }


UNITS: list[dict[str, Any]] = [
    {
        "round": 0,
        "unit": "conv_in",
        "kept": True,
        "before": 0.5,
        "learned": 0.25,
        "after": 0.25,
        "undecided": 0.0051,
        "flipped": 0.1234,
    },
    {"round": 1, "unit": "mid.attn", "kept": False, "before": 0.1, "learned": float("nan"), "after": 0.1},
]
ROUNDS: list[dict[str, Any]] = [
    {"round": 0, "timesteps": [950, 475, 0], "mismatch": [0.0, 0.01, 0.04], "mean_mismatch": 0.0167, "kept": True},
    {"round": 1, "timesteps": [950, 475, 0], "mismatch": [0.0, 0.02, 0.05], "mean_mismatch": 0.0233, "kept": False},
]


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows of every section's table, by heading."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            cells = line.replace("\\|", "\0").strip("|").split("|")
            found.setdefault(heading, []).append([c.strip().replace("\0", "|") for c in cells])
    return found


def test_everything_is_written(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / "grid.png").write_bytes(b"")
    units = [UNITS[0], {**UNITS[1], "attention": {"processor.softmax": choice().to_dict()}}]
    content = write_report(tmp_path, metrics(), COVERAGE, {"calibrate": 61.25}, units, ROUNDS)
    assert json.loads((tmp_path / "metrics.json").read_text()) == content
    json.dumps(content, allow_nan=False)
    assert content["same_noise"] == metrics()["same_noise"]
    assert content["units"][1]["learned"] is None

    text = (tmp_path / "report.md").read_text()
    found = tables(text)
    for sections in found.values():
        assert len({len(row) for row in sections}) == 1
    for link in ("samples/grid.png", "plots/noise_error.png", "plots/mismatch.png"):
        assert f"]({link})" in text
        assert (tmp_path / link).exists()
    assert [row[0] for row in found["Coverage"][2:]] == [row.name for row in COVERAGE]
    assert found["Noise error by timestep"][2] == ["950", "0.001", "0.01"]
    assert found["Mismatch by round"][-2] == ["mean", "0.0167", "0.0233"]
    assert found["Mismatch by round"][-1][2].startswith("no")
    assert found["Units"][2] == ["0", "conv_in", "0.5", "0.25", "0.25", "0.51", "12.34", "kept"]
    assert found["Units"][3][-1] == "restored"
    assert "restored for: mid.attn (round 1)" in text
    assert found["DAQ"][2] == ["mid.attn", "processor.softmax", "`LuL`", "2 of 3", "2 of 3", "0.2", "0.2"]
    for name in ("noise_error", "mismatch"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as plot:
            assert plot.width > 300
    assert not list(tmp_path.rglob("*.tmp"))


def test_executions_are_shown_by_round_and_stage() -> None:
    units = [
        {**UNITS[0], "round": 0, "samples": 10, "executions": {"full_stream": 10, "gate": 5}},
        {**UNITS[0], "round": 0, "samples": 10, "executions": {"full_stream": 10}},
        {**UNITS[0], "round": 1, "samples": 4, "executions": {"full_stream": 4, "learn_v": 8}},
    ]
    text = render({"units": units})
    assert "| round | full_stream | gate | learn_v |" in text
    assert "| 0 | 1.000 | 0.250 | 0.000 |" in text
    assert "| 1 | 1.000 | 0.000 | 2.000 |" in text


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    alone = {"noise_error": None, "same_noise": None, "scores": {}}
    write_report(tmp_path, alone, COVERAGE[:1], {}, [])
    text = (tmp_path / "report.md").read_text()
    assert set(tables(text)) == {"Quantization report", "Coverage"}
    assert not (tmp_path / "plots").exists()
    assert headline(alone) == []


def test_equal_and_diverged_images() -> None:
    rows = dict(headline({"same_noise": {"mse": 0.0, "psnr": None, "num_images": 4}}))  # of an earlier version
    assert rows == {"same-noise image MSE, unclipped (4 images)": "0", "same-noise image PSNR": "-"}


def test_what_was_undone_is_said_with_what_was_spent_on_it() -> None:
    rounds = [{"round": 0, "kept": True, "iterations": 140}, {"round": 1, "kept": False, "iterations": 60}]
    units = [{"kept": True}, {"kept": False}, {"kept": True}]
    assert headline({"rounds": rounds, "units": units}) == [
        ("round 2", "undone, the mismatch did not fall; 30% of the iterations were spent on it"),
        ("units that learning did not help", "1 of 3, left as they were"),
    ]
    assert headline({"rounds": [{"round": 0, "kept": True}, {"round": 1, "kept": False}]}) == [
        ("round 2", "undone, the mismatch did not fall")
    ]


def test_final_table_shows_the_figures() -> None:
    console = Console(record=True, width=120, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    console.print(final_table({**metrics(), "stages": {"calibrate": 61.25}}))
    text = console.export_text()
    for figure in (
        "0.0123",
        "0.0456",
        "0.0321",
        "12.25 dB",
        "23.45 dB",
        "9.877",
        "12.346 [11.000, 13.500], 5000 samples",
        "4.00",
        "61.2",
    ):
        assert figure in text


def test_attention_choice_is_json() -> None:
    record = choice().to_dict()
    assert record["logarithmic"] == [True, False, True]
    assert record["uniform_error"] == pytest.approx([0.3, 0.1, 0.2])
    assert len(record["R"]) == 3
    json.dumps(record)


def test_every_metric_has_a_row() -> None:
    distance = {"value": 8.0, "low": None, "high": None, "num_samples": 10}
    scores = {
        "fid": distance,
        "sfid": {**distance, "low": 7.0, "high": 9.0},
        "is": {"mean": 9.5, "std": 0.25, "splits": 10},
        "kid": {"mean": 0.00123, "std": 0.0001, "subsets": 100, "subset_size": 1000},
        "precision_recall": {"precision": 0.75, "recall": 0.5, "k": 3, "num_real": 10},
        "clip": {"mean": 31.46, "std_error": 0.1, "num_samples": 10},
    }
    rows = headline({"scores": {"images": scores}})
    assert rows == [
        ("FID, images", "8.000, 10 samples"),
        ("sFID, images", "8.000 [7.000, 9.000], 10 samples"),
        ("IS, images", "9.500 ± 0.250 over 10 parts"),
        ("KID, images", "0.00123 ± 0.00010 over 100 subsets of 1000"),
        ("precision, recall, images", "0.7500, 0.5000 (k = 3)"),
        ("CLIP score, images", "31.460 ± 0.100, 10 images"),
    ]
    assert "KID, images" in render({"scores": {"images": scores}})
