"""Commands on finished models: sample, evaluate, export.

python -m tcaq_lightning sample runs/default/quantized --num 64 --output grid.png
python -m tcaq_lightning evaluate runs/default/quantized --full fashion-mnist-ddpm --output metrics.json
python -m tcaq_lightning export runs/default/quantized --format openvino exported
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

from tcaq_lightning.cli import run_cli
from tcaq_lightning.errors import UserError


def sample(
    path: str,
    num: int = 64,
    output: Path = Path("grid.png"),
    scheduler: str | None = None,
    steps: int = 20,
    eta: float = 0.0,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    threads: int | None = None,
) -> None:
    """Sample images and write them as one PNG.

    Args:
        path: quantized artifact, full-precision model in diffusers layout, or name of a shipped model.
        num: number of images.
        output: PNG file.
        scheduler: class name in diffusers, such as UniPCMultistepScheduler; without it, the model's own.
        steps: sampler steps.
        eta: DDIM's noise share.
        options: further settings of the scheduler, as in --options.clip_sample false.
        seed: of the noise.
        batch_size: images at a time.
        threads: CPU threads; without it, PyTorch's choice.
    """
    import torch

    from tcaq_lightning import pipelines
    from tcaq_lightning.evaluation.grid import save_images

    _at_least(1, num=num, steps=steps, batch_size=batch_size, threads=threads)
    _at_least(0, seed=seed)
    _set_threads(threads)
    sampler = _sampler(scheduler, steps, eta, options)
    pipeline = open_model(path)
    _, denoiser = pipelines.find_denoiser(pipeline)
    pipelines.make_scheduler(pipeline.scheduler, sampler, "sampler")
    _check_writable(output)
    parts = []
    with _progress(num) as advance:
        for start in range(0, num, batch_size):
            indices = range(start, min(start + batch_size, num))
            parts.append(pipelines.sample(denoiser, pipeline.scheduler, sampler, indices, seed).cpu())
            advance(len(indices))
    save_images(pipelines.to_images(torch.cat(parts)), output, columns=math.ceil(math.sqrt(num)))


def evaluate(
    path: str,
    full: str | None = None,
    num_images: int = 512,
    num_trajectories: int = 32,
    fid_samples: int = 5000,
    features: str = "fashion-mnist-features",
    scheduler: str | None = None,
    steps: int = 20,
    eta: float = 0.0,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    threads: int | None = None,
    output: Path | None = None,
    cache: Path | None = None,
) -> None:
    """Measure FID; beside a full-precision model also the noise error and the same-noise images' MSE and PSNR.

    Args:
        path: quantized artifact, full-precision model in diffusers layout, or name of a shipped model.
        full: full-precision model to compare with.
        num_images: images of both models from the same noise.
        num_trajectories: full-precision trajectories for the noise error.
        fid_samples: images for FID; 0 leaves it out.
        features: feature extractor with reference statistics: a directory or the name of a shipped one.
        scheduler: class name in diffusers, such as UniPCMultistepScheduler; without it, the model's own.
        steps: sampler steps.
        eta: DDIM's noise share.
        options: further settings of the scheduler, as in --options.clip_sample false.
        seed: of the noise.
        batch_size: images at a time.
        threads: CPU threads; without it, PyTorch's choice.
        output: JSON file for all figures.
        cache: directory for finished batches, so that the same command goes on after it was killed.
    """
    from rich.console import Console

    from tcaq_lightning.config import EvaluationConfig
    from tcaq_lightning.evaluation import evaluate as evaluation
    from tcaq_lightning.files import write_json
    from tcaq_lightning.pipelines import find_denoiser, sample_shape
    from tcaq_lightning.report import final_table

    _at_least(1, num_images=num_images, num_trajectories=num_trajectories, steps=steps, batch_size=batch_size)
    _at_least(1, threads=threads)
    _at_least(0, fid_samples=fid_samples, seed=seed)
    _set_threads(threads)
    sampler = _sampler(scheduler, steps, eta, options)
    config = EvaluationConfig(num_trajectories, num_images, fid_samples, features, batch_size, sampler)
    pipeline = open_model(path)
    _, denoiser = find_denoiser(pipeline)
    models: dict[str, Any] = {"full": None, "quantized": denoiser}
    if full is not None:
        models["full"] = find_denoiser(open_model(full))[1]
        if sample_shape(models["full"]) != sample_shape(denoiser):
            raise UserError(
                f"--full: expected a model of samples {sample_shape(denoiser)} like {path}, "
                f"got {sample_shape(models['full'])} from {full}; give the model that was quantized"
            )
    elif not is_quantized(path):
        models = {"full": denoiser, "quantized": None}
    if output is not None:
        _check_writable(output)
    total = evaluation.planned_samples(config, sum(m is not None for m in models.values()))
    with _progress(total) as advance:
        metrics = evaluation.evaluate(
            **models,
            scheduler=pipeline.scheduler,
            calibration_sampler=sampler,
            config=config,
            seed=seed,
            cache_dir=cache,
            advance=advance,
        )
    content = {"model": path, "compared_with": full, "seed": seed, **metrics.to_dict()}
    Console().print(final_table({**content, "stages": metrics.seconds}))
    if output is not None:
        write_json(output, content)


def export(
    path: str,
    output: Path,
    format: Literal["onnx", "openvino"] = "onnx",  # noqa: A002 - the option's name
    four_bit: bool = True,
    tokens: int = 77,
    allow_float: bool = False,
    threads: int | None = None,
) -> None:
    """Export the denoiser of an artifact as one graph of integers for all timesteps.

    The graph is opened in the engines that are installed, and the kernel of every quantized product is listed. If one
    fell back to float that is not meant to, nothing is written.

    Args:
        path: quantized artifact.
        output: file ending in .onnx or .xml, or a directory.
        format: one ONNX file with QuantizeLinear and DequantizeLinear, or OpenVINO's IR.
        four_bit: store codes of at most 4 bits in 4 bits; else in 8, for engines without 4-bit integers.
        tokens: length of the context, where the denoiser attends to one.
        allow_float: write the file although products fell back to float.
        threads: CPU threads; without it, the engines' choice.
    """
    from tcaq_lightning.export.command import export_artifact

    _at_least(1, tokens=tokens, threads=threads)
    _set_threads(threads)
    exported = export_artifact(path, output, format, four_bit, tokens, allow_float, threads)
    sys.stdout.write("\n".join([*exported.lines, *(f"wrote {file}" for file in exported.files)]) + "\n")


def is_quantized(path: str) -> bool:
    """Whether a model directory holds an artifact: its denoiser's config.json has a `quantization_config`."""
    from tcaq_lightning.pipelines import DENOISER_NAMES, shipped

    for name in DENOISER_NAMES:
        file = (shipped(path) or Path(path)) / name / "config.json"
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"expected JSON in {file}, got {error}; write the model again") from error
            return isinstance(content, dict) and "quantization_config" in content
    return False


def open_model(path: str) -> Any:
    """Open an artifact, or a full-precision model, as a pipeline.

    Raises:
        UserError: there is no such model.
    """
    from tcaq_lightning.pipelines import open_pipeline

    if is_quantized(path):
        from tcaq_lightning.artifact import load_quantized

        return load_quantized(path)
    return open_pipeline(path)


def _sampler(scheduler: str | None, steps: int, eta: float, options: dict[str, Any] | None) -> Any:
    from tcaq_lightning.config import SamplerConfig

    return SamplerConfig(scheduler, steps, eta, options or {})


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")


def _check_writable(file: Path) -> None:
    """Find out before the work, not after it, that its result cannot be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--output: expected a file that can be written, got {file}; choose another path")


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; gives the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("samples", total=total)
        yield lambda count: progress.advance(task, count)


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; None takes those of the process.

    Returns:
        The exit code, as `run_cli` makes it.
    """

    def command() -> None:
        auto_cli([sample, evaluate, export], args=argv, exit_on_error=False, prog="python -m tcaq_lightning")

    return run_cli(command)


if __name__ == "__main__":
    sys.exit(main())
