"""Every script runs on a tiny model and prints what it promises; the figures themselves are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.common import (
    ROOT,
    anonymous_memory,
    calibration,
    denoiser_config,
    make_denoiser,
    model_path,
    train_here,
)
from benchmarks.cost import check, cost
from benchmarks.depth import depth, unet_config
from benchmarks.executions import COMPARED, STREAMS, executions
from benchmarks.kills import kills
from benchmarks.memory import memory
from benchmarks.range_search import range_search
from benchmarks.ranks import ranks
from benchmarks.stages import shares, stages
from benchmarks.step import step
from benchmarks.summary import draw, read_results, table
from benchmarks.true_size import TEXT_CONFIG, coverage, true_size
from tcaq_lightning.calibration.planning.cost import Rates, passes
from tcaq_lightning.cli import parse_config
from tcaq_lightning.config import Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import on_meta


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny model."""
    directory = tmp_path_factory.mktemp("run")
    settings = calibration(directory / "run", model_path("tiny", directory), 1, 2, 1, 2, 8, 4)
    metrics = train_here(settings)
    assert metrics["units"]
    return directory / "run"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ddpm-cifar10-32", 35_746_307),
        ("stable-diffusion-v1-4", 859_520_964),
        ("sdxl-base-1.0", 2_567_463_684),
    ],
)
def test_models_have_their_published_sizes(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in on_meta(denoiser_config(name)).parameters()) == parameters


def test_unknown_models_are_refused() -> None:
    with pytest.raises(UserError, match="ddpm-cifar10-32"):
        denoiser_config("nothing")


def test_random_weights_are_the_same_every_time() -> None:
    first, second = (make_denoiser(denoiser_config("tiny")).state_dict() for _ in range(2))
    assert all((first[key] == second[key]).all() for key in first)


def test_step() -> None:
    result = step("tiny", steps=3, repetitions=1, batch_size=4, trajectories=1, sampler_steps=2)
    assert set(result["phases"]) == {"r", "v"}
    for phase in result["phases"].values():
        assert len(phase["units"]) == 7
        assert phase["ratio"] == phase["step_ms"] / phase["limit_ms"]
        assert phase["worst_ratio"] == max(phase["units"].values())
        assert min(phase["units"].values()) <= phase["ratio"] <= phase["worst_ratio"]


def test_executions() -> None:
    result = executions("tiny", trajectories=2, held_out=1, sampler_steps=2, iterations=8, batch_size=4)
    assert result["once_per_stream"]
    assert result["stored_for_nothing"] == 0
    assert result["disagreeing_with_metrics"] == []
    assert result["samples"] == 2 * (2 + 1) + 2 * (1 + 1)
    assert set(COMPARED) <= set(result["per_sample"])
    for stream in STREAMS:
        assert result["per_sample"][stream] == {"least": 1.0, "mean": 1.0, "most": 1.0}
    assert result["per_sample"]["search"]["least"] > 0


def test_range_search() -> None:
    result = range_search(channels=6, inputs=40, candidates=20, repetitions=1)
    assert result["equal_channels"] == result["channels"] == 6
    assert result["speed_up"] == result["loop_seconds"] / result["vectorised_seconds"]


def test_shares_of_stages() -> None:
    result = shares({"learn_r": 2.0, "learn_v": 5.0, "search": 1.0, "scores": 9.0}, wall=19.0)
    assert result["calibration_seconds"] == 10.0
    assert result["outside_share"] == pytest.approx(0.3)
    assert result["share"] == {"learn_r": 0.2, "learn_v": 0.5, "search": 0.1, "other": 0.2}


def test_stages_of_a_finished_run(run_dir: Path) -> None:
    result = stages(run_dir=run_dir)
    assert result["iterations"] == 8
    assert 0 < result["outside_share"] < 1
    assert sum(result["share"].values()) == pytest.approx(1)


def test_cost_of_a_finished_run(run_dir: Path) -> None:
    result = check(run_dir, Rates(), repetitions=1)
    assert {"learn_r", "learn_v", "streams", "search", "gate"} <= set(result["stages"])
    assert result["ratio"] == pytest.approx(result["predicted_seconds"] / result["measured_seconds"])


@pytest.mark.slow
def test_cost_of_large_models() -> None:
    once, twice = (
        cost(models=["stable-diffusion-v1-4"], trajectories=8, ranks=n, rank_efficiency=0.5)["predicted"][0]
        for n in (1, 4)
    )
    assert once["forward_tflop"] == pytest.approx(0.8, rel=0.2)
    assert twice["hours"] == pytest.approx(once["hours"] / 2)
    assert twice["store_gb_per_rank"] == pytest.approx(once["store_gb_per_rank"] / 4)


def test_passes_grow_with_the_iterations() -> None:
    def loop(iterations: int) -> float:
        config = Config()
        config.reconstruction.iterations = iterations
        counted = passes(config, config.calibration.sampler.num_steps, Rates(learn_r=2.0, learn_v=2.0))
        return counted["learn_r"] + counted["learn_v"]

    assert loop(400) == 2.0 * 400 * 32
    assert loop(800) == 2 * loop(400)


def test_deeper_unets_have_as_many_times_the_blocks() -> None:
    counts = []
    for k in (1, 2, 4):
        names = {n.split(".conv1")[0] for n, _ in make_denoiser(unet_config(k, 8, 8)).named_modules() if "conv1" in n}
        counts.append(len(names))
    assert counts == [8, 16, 32]


@pytest.mark.slow
def test_one_json_line() -> None:
    options = ["--channels", "2", "--inputs", "9", "--repetitions", "1"]
    command = [sys.executable, "-m", "benchmarks.range_search", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = ended.stdout.splitlines()
    assert json.loads(line)["benchmark"] == "range_search"


def test_anonymous_memory_sees_what_is_allocated() -> None:
    before = anonymous_memory()
    block = bytearray(1 << 26)
    assert anonymous_memory() - before > 0.9 * len(block)


def test_summary_takes_the_last_line_of_each_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    units = {"conv_in": 1.5, "mid_block": 1.25}
    phase = {"ratio": 1.3, "units": units}
    memory = {"samples": 256, "ratio": 1.04, "models": 1e8, "budget": 5e8, "workspace": 2e8, "peak": 8.3e8}
    lines = [
        {"benchmark": "range_search", "shape": [6, 40], "threads": 1, "speed_up": 3.0},
        {"benchmark": "step", "model": "tiny", "threads": 2, "phases": {"r": phase, "v": phase}},
        {"benchmark": "memory", "model": "tiny", "threads": 1, "runs": [memory]},
        {"benchmark": "kills", "model": "tiny", "runs": 20, "kills": 50, "identical": 20},
        {"benchmark": "range_search", "shape": [6, 40], "threads": 1, "speed_up": 7.0},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    results = read_results(path)
    assert table(results).splitlines()[2:] == [
        "| range_search, 1 thread | loop over channels / vectorised search, 6 x 40 |  | 7 |",
        "| step, tiny, 2 threads | a step of phase r / plain training's | <= 1.35 | 1.30 |",
        "| step, tiny, 2 threads | a step of phase v / plain training's | <= 1.35 | 1.30 |",
        "| memory, tiny, 1 thread | peak / (models + budget + workspace), 256 samples | <= 1.10 | 1.04 |",
        "| kills, tiny | bit-identical artifacts after 50 SIGKILLs | 20/20 | 20/20 |",
    ]
    draw(results, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > picture.height > 0


def test_summary_of_real_results(run_dir: Path) -> None:
    real = [{"benchmark": "stages", **stages(run_dir=run_dir)}, {"benchmark": "cost", **cost([run_dir], models=[])}]
    assert len(table(real).splitlines()) == 2 + 1 + 1


@pytest.mark.parametrize("line", ["{", "[]", '{"model": "tiny"}'])
def test_summary_refuses_other_files(line: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=r"results\.jsonl:1 must be the JSON line of a benchmark"):
        read_results(path)


def test_coverage_accounts_for_all_of_stable_diffusion() -> None:
    config, _ = parse_config(["--config", str(TEXT_CONFIG)])
    result = coverage(on_meta(denoiser_config("stable-diffusion-v1-4")), config)
    assert result["parameters"] == 859_520_964
    assert result["covered"] == 1
    assert result["unknown"] == result["kept"] == []


def test_summary_of_true_sizes() -> None:
    whole = {"minutes": 7.34, "minutes_limit": 30.0, "run": {"peak_rss_gb": 2.04}}
    units = [{"unit": "conv_in"}, {"unit": "mid_block"}]
    first = {"units": units, "peak_rss_gb": 9.87, "peak_rss_limit_gb": 12, "coverage": {"covered": 1.0}}
    results = [{"benchmark": "true_size", "model": m, "threads": 2, **r} for m, r in (("a", whole), ("b", first))]
    assert table(results).splitlines()[2:] == [
        "| true_size, a, 2 threads | minutes of a whole run | <= 30 | 7.3 |",
        "| true_size, a, 2 threads | GB at most, of all memory |  | 2.0 |",
        "| true_size, b, 2 threads | GB at most, of all memory: plan, coverage, units up to mid_block | <= 12 | 9.9 |",
        "| true_size, b, 2 threads | share of the parameters that the coverage accounts for | 100 % | 100% |",
    ]


@pytest.mark.slow
def test_a_whole_run_of_true_size() -> None:
    result = true_size("tiny", trajectories=2, held_out=1, sampler_steps=2, iterations=8, batch_size=4)
    assert result["within_limit"]
    assert result["rounds"] == 2
    assert result["units_learned"] == 2 * result["plan"]["units"]
    assert sum(result["seconds"].values()) == pytest.approx(result["run"]["wall_seconds"])
    assert min(result[part]["peak_rss_gb"] for part in ("run", "reopened")) > 0.1


@pytest.mark.slow
def test_first_units_of_true_size() -> None:
    result = true_size("tiny-text", iterations=8)
    assert result["within_limit"]
    assert result["peak_rss_gb"] >= result["peak_anonymous_gb"] > 0.1
    assert result["coverage"]["covered"] == 1
    assert result["units"][-1]["unit"] == "down_blocks.0.attentions.0.transformer_blocks.0"
    assert any(unit["unit"].startswith("down_blocks.0.resnets") for unit in result["units"])
    assert all(unit["seconds"]["learn_v"] > 0 for unit in result["units"])


@pytest.mark.slow
def test_ranks() -> None:
    result = ranks("tiny", iterations=8, trajectories=4, held_out=2, sampler_steps=2, batch_size=4, images=2)
    assert set(result["efficiency"]) == {"loop", "loop, one rank's batch shared", "outside the loop"}
    assert all(efficiency > 0 for efficiency in result["efficiency"].values())


@pytest.mark.slow
def test_killed_runs_end_in_the_same_artifact() -> None:
    result = kills(runs=2, kills_each=1, iterations=8)
    assert result["identical"] == result["runs"] == result["kills"] == 2


@pytest.mark.slow
def test_memory() -> None:
    result = memory("tiny", samples=(16, 32), sampler_steps=4, iterations=8, batch_size=4, host=0.001)
    assert [r["samples"] for r in result["runs"]] == [16, 32]
    assert all(r["peak"] > 0 and r["store"] <= r["budget"] for r in result["runs"])


@pytest.mark.slow
def test_depth() -> None:
    small: dict[str, Any] = {"trajectories": 2, "sampler_steps": 2, "iterations": 8, "batch_size": 4}
    result = depth(depths=(1, 2), channels=8, size=8, **small)
    assert result["blocks_ratio"] == 2
    assert result["seconds_per_work"] == pytest.approx(result["seconds_ratio"] / result["flops_ratio"])


@pytest.mark.slow
def test_stages_of_a_run() -> None:
    result = stages("tiny", iterations=8, trajectories=2, held_out=1, sampler_steps=2, batch_size=4)
    assert result["seconds"]["other"] > 0
