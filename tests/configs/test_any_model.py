"""The four widths serve every model: those of the package, and transformers and UNets that text conditions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tcaq_lightning.api import open_model, quantize
from tcaq_lightning.cli import parse_config
from tcaq_lightning.config import Config
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline
from tcaq_lightning.nn.prepare import quantize as quantize_denoiser
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tests.text_models import CALL_OPTIONS, make_text_model

CONFIGS = Path(__file__).parents[2] / "configs"
BITS = ("w8a8", "w6a6", "w4a8", "w4a4")
SHIPPED = ("fashion-mnist-ddpm", "fashion-mnist-latent", "fashion-mnist-dit")
TEXT = ("Flux", "SD3", "SDXL")
PLANNED = ("fashion-mnist-dit", "Flux", "SD3")
"""Models whose plan is made in the fast tests; the others take longer."""
FEW: dict[str, Any] = {
    "calibration.num_trajectories": 2,
    "calibration.held_out_trajectories": 1,
    "calibration.mismatch_trajectories": 1,
    "calibration.sampler.num_steps": 2,
    "quantization.activation.timestep_groups": 2,
    "reconstruction.iterations": 6,
    "reconstruction.batch_size": 2,
    "reconstruction.compile_kernels": "false",
    "evaluation.num_trajectories": 1,
    "evaluation.num_images": 1,
    "trainer.threads": 1,
    "trainer.accelerator": "cpu",
    "logging.tensorboard": "false",
}


@pytest.fixture(scope="session")
def open_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Opens one of the six models, each once."""
    opened: dict[str, Any] = {}

    def opening(name: str) -> Any:
        if name not in opened:
            directory = tmp_path_factory.mktemp("tokenizer")
            opened[name] = make_text_model(name, directory) if name in TEXT else open_pipeline(name)
        return opened[name]

    return opening


def config_of(bits: str, model: str, run_dir: Path) -> Config:
    """What a user gives beside the width: the model, its prompts, and how little to do here."""
    settings = FEW | {"run_dir": run_dir}
    if model in TEXT:
        run_dir.mkdir(parents=True, exist_ok=True)
        prompts = run_dir.with_suffix(".txt")
        prompts.write_text("a red boot\na bag\n")
        own = run_dir.with_suffix(".yaml")
        own.write_text(yaml.safe_dump({"conditioning": {"prompts": str(prompts), "options": CALL_OPTIONS[model]}}))
        files = [CONFIGS / f"{bits}.yaml", own]
    else:
        files = [CONFIGS / f"{bits}.yaml"]
        settings["model.path"] = model
    arguments = [argument for file in files for argument in ("--config", str(file))]
    return parse_config([*arguments, *(f"--{key}={value}" for key, value in settings.items())])[0]


@pytest.mark.parametrize("model", [*SHIPPED, *TEXT])
def test_every_width_covers_every_model(model: str, open_once: Callable[[str], Any]) -> None:
    """The first, last, time and modulation layers keep 8 bits, all others have the width's."""
    _, denoiser = find_denoiser(open_once(model))
    for bits in BITS:
        config = parse_config(["--config", str(CONFIGS / f"{bits}.yaml")])[0].quantization
        rows = quantize_denoiser(copy.deepcopy(denoiser), config, TimestepGroups([500.0]))
        found = {role: {row.bits for row in rows if row.role == role} for role in {row.role for row in rows} - {""}}
        assert {"input", "output", "time", "block"} <= set(found)
        width = f"W{bits[1]} A{bits[3]}"
        expected = {"block": {width}, "shortcut": {f"W{bits[1]} A8"}}
        assert found == {role: expected.get(role, {"W8 A8"}) for role in found}
        assert not any(row.note.startswith("unknown") for row in rows)


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=[] if m in PLANNED else [pytest.mark.slow]) for m in (*SHIPPED, *TEXT)]
)
def test_plan(model: str, open_once: Callable[[str], Any], tmp_path: Path) -> None:
    opened = open_model(config_of("w4a4", model, tmp_path / "run"), copy.deepcopy(open_once(model)))
    assert opened.plan.units == len(opened.graph.names) > 5
    assert opened.plan.seconds > 0
    assert not [name for name in opened.plan.kept if "(" in name]


@pytest.mark.parametrize(
    ("bits", "model"),
    [
        pytest.param(bits, model, marks=[] if (bits, model) == ("w4a4", "Flux") else [pytest.mark.slow])
        for bits in BITS
        for model in (*SHIPPED, *TEXT)
    ],
)
def test_run(bits: str, model: str, open_once: Callable[[str], Any], tmp_path: Path) -> None:
    quantized: Any = quantize(copy.deepcopy(open_once(model)), config_of(bits, model, tmp_path / "run"))
    assert isinstance(find_denoiser(quantized)[1], type(find_denoiser(open_once(model))[1]))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["noise_error"]["summary"] < 2
