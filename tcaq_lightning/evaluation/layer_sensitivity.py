"""How much each layer costs by itself: the noise error of the full-precision model with one layer of the artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.artifact.directory import artifact_digest
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.config import ConditioningConfig, SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.cache import read_cached, write_cached
from tcaq_lightning.evaluation.denoiser_errors import NoiseError
from tcaq_lightning.evaluation.evaluate import HELD_OUT_START
from tcaq_lightning.evaluation.json_values import finite
from tcaq_lightning.models.families import is_attention
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline, sample_shape
from tcaq_lightning.models.sampling import make_sampling
from tcaq_lightning.models.trajectories import Trajectories, collect
from tcaq_lightning.nn.attention import quantized_processor
from tcaq_lightning.nn.grouped import grouped
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import quant_layers, set_submodule
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.json_shape import MEASURED, NUMBER, TEXT, Named

FILE = Path("report") / "sensitivity.json"
BATCH_SIZE = 64
WHOLE = "all layers and attentions"
"""Name of the whole quantized denoiser among the parts."""
_SHAPE = {"timesteps": [NUMBER], "parts": Named({"kind": TEXT, "summary": MEASURED, "relative": [MEASURED]})}

Advance = Callable[[int, int], None]
"""Told how many parts of how many are done."""


def measured_sensitivity(run_dir: Path) -> dict[str, Any] | None:
    """What `measure_sensitivity` has measured for the present artifact, complete or not; None if nothing."""
    path = run_dir / FILE
    if not path.is_file():
        return None
    return read_cached(path, _SHAPE, artifact=artifact_digest(run_dir / "quantized"))


def measure_sensitivity(
    run_dir: Path, config: Mapping[str, Any], num_trajectories: int, advance: Advance | None = None
) -> dict[str, Any]:
    """Quantize each layer and each attention alone and measure the noise error; it can be stopped and resumed.

    Full-precision trajectories are those of the run's own noise error, the first `num_trajectories` of them.

    Args:
        run_dir: of a finished run; what is measured is kept in RUN_DIR/report/sensitivity.json, part by part.
        config: the run's configuration, from its manifest.
        num_trajectories: held-out trajectories.
        advance: told of the progress.

    Returns:
        `timesteps` (S,) and `parts`: by name, `kind`, `relative` error by timestep (S,), and `summary`, their mean over
        t > 0. `WHOLE` is the whole quantized denoiser.

    Raises:
        UserError: the artifact or the full-precision model cannot be opened, or do not fit each other.
    """
    key = _key(run_dir, config, num_trajectories)
    pipeline, full, quantized = _open(run_dir, config)
    content = read_cached(run_dir / FILE, _SHAPE, **key) or {"timesteps": [], "parts": {}}
    names = [*parts_of(quantized), WHOLE]
    missing = [name for name in names if name not in content["parts"]]
    done = len(names) - len(missing)
    if advance is not None:
        advance(done, len(names))
    if not missing:
        return content
    paths = _held_out(pipeline, full, config, num_trajectories)
    targets = predictions(full, paths)
    content["timesteps"] = paths.timesteps[:: paths.halves].tolist()
    for number, name in enumerate(missing, start=done + 1):
        content["parts"][name] = finite(_measured_part(full, quantized, name, paths, targets))
        write_cached(run_dir / FILE, content, **key)
        if advance is not None:
            advance(number, len(names))
    return content


def _key(run_dir: Path, config: Mapping[str, Any], num_trajectories: int) -> dict[str, Any]:
    """What the measurement depends on, JSON-ready."""
    return {
        "artifact": artifact_digest(run_dir / "quantized"),
        "model": config["model"]["path"],
        "sampler": config["calibration"]["sampler"],
        "conditioning": config["conditioning"],
        "seed": config["seed"],
        "num_trajectories": num_trajectories,
    }


def _open(run_dir: Path, config: Mapping[str, Any]) -> tuple[Any, nn.Module, nn.Module]:
    """The full-precision pipeline, its denoiser, and the quantized one."""
    path = config["model"]["path"]
    pipeline: Any = open_pipeline(path)
    _, full = find_denoiser(pipeline)
    _, quantized = find_denoiser(load_quantized(run_dir / "quantized"))
    if sample_shape(full) != sample_shape(quantized):
        raise UserError(
            f"model.path: expected the model that was quantized, of samples {sample_shape(quantized)}, got "
            f"{sample_shape(full)} from {path}"
        )
    return pipeline, full, quantized


def _held_out(pipeline: Any, full: nn.Module, config: Mapping[str, Any], num_trajectories: int) -> Trajectories:
    """The first held-out trajectories of the run's own noise error."""
    indices = range(HELD_OUT_START, HELD_OUT_START + num_trajectories)
    sampler = SamplerConfig(**config["calibration"]["sampler"])
    sampling = make_sampling(pipeline, ConditioningConfig(**config["conditioning"]))
    return collect(full, sampling, sampler, indices, config["seed"], BATCH_SIZE)


def _measured_part(
    full: nn.Module, quantized: nn.Module, name: str, paths: Trajectories, targets: list[Tensor]
) -> dict[str, Any]:
    """`kind`, `summary` and `relative` error of a part, or of the whole quantized denoiser."""
    if name == WHOLE:
        error, kind = relative_error(quantized, paths, targets), "model"
    else:
        with alone(full, quantized, name):
            error = relative_error(full, paths, targets)
        kind = "attention" if is_attention(full.get_submodule(name)) else "layer"
    return {"kind": kind, "summary": error.summary, "relative": error.relative.tolist()}


def parts_of(quantized: nn.Module) -> list[str]:
    """Names of what can be quantized alone: layers with weights, and attentions with their matmuls."""
    return [
        name
        for name, module in quantized.named_modules()
        if isinstance(module, QuantLayer) or quantized_processor(module) is not None
    ]


@contextmanager
def alone(full: nn.Module, quantized: nn.Module, name: str) -> Iterator[None]:
    """Put one quantized layer, or one attention's quantized matmuls, into the full-precision model for a while.

    A layer comes with the quantizer of its input. Its correction of mean errors is left out: that belongs to the
    errors of a whole unit, which are not there.

    Args:
        full: full-precision denoiser, changed within.
        quantized: frozen denoiser of the same architecture.
        name: one of `parts_of(quantized)`.
    """
    part, place = quantized.get_submodule(name), full.get_submodule(name)
    with grouped(full, groups_of(quantized)):
        if isinstance(part, QuantLayer):
            correction, part.bias_shift = part.bias_shift, None
            set_submodule(full, name, part)
            try:
                yield
            finally:
                set_submodule(full, name, place)
                part.bias_shift = correction
        else:
            attention: Any = place
            other: Any = part
            own = attention.processor
            attention.set_processor(other.processor)
            try:
                yield
            finally:
                attention.set_processor(own)


def groups_of(quantized: nn.Module) -> TimestepGroups:
    """The timestep groups that a quantized denoiser's quantizers share."""
    layer = next(iter(quant_layers(quantized).values()), None)
    if layer is not None:
        return layer.input_quantizer.groups
    processors = (quantized_processor(module) for module in quantized.modules())
    return next(processor for processor in processors if processor is not None).query.groups


@torch.no_grad()
def predictions(denoiser: nn.Module, paths: Trajectories) -> list[Tensor]:
    """Outputs of a denoiser for every sampler step of the trajectories: (N, ...), with all rows of a guided sample."""
    numbers = torch.split(torch.arange(paths.num_trajectories), BATCH_SIZE)
    by_call = [
        torch.cat([paths.at(torch.full_like(part, call), part).predict(denoiser) for part in numbers])
        for call in range(paths.num_steps)
    ]
    return [torch.cat(by_call[i : i + paths.halves]) for i in range(0, paths.num_steps, paths.halves)]


def relative_error(denoiser: nn.Module, paths: Trajectories, targets: list[Tensor]) -> NoiseError:
    """Noise error of a denoiser against known full-precision predictions, as `noise_error` measures it.

    Args:
        denoiser: whose error.
        paths: full-precision trajectories.
        targets: `predictions` of the full-precision denoiser.
    """
    differences, relative = [], []
    for output, target in zip(predictions(denoiser, paths), targets, strict=True):
        difference = output.double() - target.double()
        differences.append(difference.mean())
        power = target.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        relative.append(difference.square().sum() / power)
    return NoiseError(paths.timesteps[:: paths.halves].double(), torch.stack(relative), torch.stack(differences))
