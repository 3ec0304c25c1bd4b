"""The main job, one function a step: open, collect, calibrate, save, measure, report.

`train.py` calls them in this order and shows what they do; `quantize` is the same for a pipeline at hand. Each step
keeps what it has done in the run's directory, so that the same calls again go on where the last ones stopped. With
several processes every rank makes the same calls, within `launched(config)`.

    with Run(config) as run:
        model = open_model(config, earlier_plan=run.manifest.get("plan"))
        run.start(**model.facts())
        trajectories = collect_trajectories(model, run)
        calibrated = calibrate(model, trajectories, run)
        save(model, run)
        metrics = measure(model, run)
        report(model, calibrated, metrics, run)
        run.finish()
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers import DiffusionPipeline
from torch import nn

from tcaq_lightning.artifact.directory import artifact_sizes, freeze, save_artifact
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.calibration.planning.plan import Plan, check_stop, make_plan
from tcaq_lightning.calibration.rounds import run_rounds
from tcaq_lightning.calibration.run_dir import Run, settings_of_result
from tcaq_lightning.calibration.state import Calibrated, Setup
from tcaq_lightning.calibration.stored import shared_trajectories, stored_trajectories
from tcaq_lightning.config import Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.evaluate import Evaluation, evaluate, open_features
from tcaq_lightning.evaluation.grid import save_grid
from tcaq_lightning.evaluation.spaces import FeatureSpace, evaluation_hashes
from tcaq_lightning.methods.check import check_methods
from tcaq_lightning.models.adapters import refuse_adapters
from tcaq_lightning.models.borrowed import borrowed
from tcaq_lightning.models.fingerprint import pipeline_hashes
from tcaq_lightning.models.graph import UnitGraph, trace_units
from tcaq_lightning.models.pipelines import (
    denoiser_bytes,
    find_denoiser,
    open_pipeline,
    other_networks,
    quiet_diffusers,
    to_images,
)
from tcaq_lightning.models.sampling import Inputs, Sampling, make_sampling
from tcaq_lightning.models.trajectories import Trajectories, probe
from tcaq_lightning.nn.coverage import CoverageRow
from tcaq_lightning.nn.prepare import foresee_calls, shared_copy
from tcaq_lightning.nn.prepare import quantize as quantize_denoiser
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, group_boundaries
from tcaq_lightning.reports.markdown import write_report
from tcaq_lightning.runtime.distributed.collectives import on_main
from tcaq_lightning.runtime.distributed.launch import launched
from tcaq_lightning.runtime.extensions import load_extensions
from tcaq_lightning.runtime.kernels import compiled_kernels
from tcaq_lightning.runtime.lightning import choose_device, quiet_lightning
from tcaq_lightning.runtime.memory import peak_memory
from tcaq_lightning.runtime.undisturbed import undisturbed

Advance = Callable[[int], None]
"""Told the number of samples just done, for a progress bar."""


def quantize(
    pipeline: Any,
    config: Config,
    run_dir: str | Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
    inputs: Inputs | None = None,
) -> DiffusionPipeline:
    """Quantize a pipeline's denoiser: calibrate on its own samples, write an integer artifact, measure what it cost.

    The same call again resumes where the last one stopped, in `run_dir`; a finished run is opened. The directory gets
    the artifact, metrics.json and report.md. Nothing is printed and no event files are written: callbacks that are
    handed in do that. The caller's configuration, pipeline and process are left as they were: torch's threads and
    random state, warning filters, loggers.

    Args:
        pipeline: any diffusers pipeline from noise to images, such as `DDPMPipeline(unet, scheduler)`. While the
            call lasts, it is on the device that `config.trainer` says.
        config: what a YAML file would say; `config.model` is taken down, not opened.
        run_dir: directory of everything that is written; None takes `config.run_dir`.
        callbacks: Lightning callbacks of each unit's observation and fits; a `CalibrationCallback` is told about
            units and rounds too.
        inputs: gives the denoiser's arguments that the pipeline's call does not know, for numbered samples.

    Returns:
        The pipeline with its integer denoiser, as `load_quantized` opens it.

    Raises:
        UserError: the settings or the pipeline cannot be worked with.

    >>> from diffusers import DDPMPipeline
    >>> quantize(DDPMPipeline(unet, scheduler), Config(), "runs/mine")  # doctest: +SKIP
    """
    config = copy.deepcopy(config)
    if run_dir is not None:
        config.run_dir = Path(run_dir)
    if config.trainer.stop_after is not None:
        raise UserError(
            f"trainer.stop_after is {config.trainer.stop_after!r}, but `quantize` returns the whole pipeline; expected "
            "null: call train.py, or the functions of `tcaq_lightning.api` one by one, to stop early"
        )
    with undisturbed(), borrowed(pipeline):
        quiet_diffusers()
        quiet_lightning()
        load_extensions(config.extensions)
        with launched(config), Run(config) as run:
            if run.finished:
                check_finished(config, run, pipeline, inputs)
            else:
                all_steps(config, run, pipeline, callbacks, inputs)
        return load_quantized(run.files.artifact)


def all_steps(
    config: Config,
    run: Run,
    pipeline: Any = None,
    callbacks: Sequence[pl.Callback] = (),
    inputs: Inputs | None = None,
) -> None:
    """The main job from its opening to its report.

    Args:
        config: the run's configuration.
        run: its directory, not finished.
        pipeline: the diffusers pipeline; None opens `config.model`.
        callbacks: as in `quantize`.
        inputs: as in `quantize`.

    Raises:
        UserError: the settings or the pipeline cannot be worked with.
    """
    model = open_model(config, pipeline, inputs, run.manifest.get("plan"))
    model.plan.check(run.directory)
    run.start(**model.facts())
    trajectories = collect_trajectories(model, run)
    calibrated = calibrate(model, trajectories, run, callbacks)
    assert calibrated is not None  # nothing stops it early
    save(model, run)
    metrics = measure(model, run)
    report(model, calibrated, metrics, run)
    run.finish()


def check_finished(config: Config, run: Run, pipeline: Any = None, inputs: Inputs | None = None) -> None:
    """See that a finished run is of the model and the other inputs that are at hand now.

    Args:
        config: the run's configuration.
        run: finished.
        pipeline: the diffusers pipeline; None opens `config.model`.
        inputs: as in `quantize`.

    Raises:
        UserError: an input has changed, or the artifact.
    """
    if pipeline is None:
        pipeline = _open_pipeline(config)
    sampling = make_sampling(pipeline, config.conditioning, inputs)
    features = open_features(config.evaluation, sampling.channels(find_denoiser(pipeline)[1]))
    run.check_finished(_input_hashes(config, pipeline, sampling, features))


def _open_pipeline(config: Config) -> DiffusionPipeline:
    return open_pipeline(config.model.path, config.model.variant, getattr(torch, config.model.dtype))


def _input_hashes(config: Config, pipeline: Any, sampling: Sampling, features: FeatureSpace | None) -> dict[str, str]:
    """Hash of everything that a result depends on beside the settings, by name."""
    found = {f"model.{name}": value for name, value in pipeline_hashes(pipeline).items()}
    found |= {f"conditioning.{name}": value for name, value in sampling.hashes().items()}
    found |= {f"evaluation.{name}": value for name, value in evaluation_hashes(config.evaluation, features).items()}
    return found | {f"extensions: {name}": value for name, value in load_extensions(config.extensions).items()}


@dataclass(frozen=True)
class OpenedModel:
    """A pretrained pipeline, ready for calibration.

    Attributes:
        config: the run's configuration.
        pipeline: the diffusers pipeline, on the device.
        name: component name of its denoiser, such as `unet`.
        full: that denoiser, in full precision.
        quantized: its twin with quantized layers, which shares its weights.
        sampling: how the pipeline is sampled.
        timestep_groups: timestep groups of the quantized denoiser.
        graph: units in execution order.
        coverage: what became of every layer.
        plan: counts, memory and time of the run.
        inputs: by name, hashes of what the result depends on beside the settings.
    """

    config: Config
    pipeline: Any
    name: str
    full: nn.Module
    quantized: nn.Module
    sampling: Sampling
    timestep_groups: TimestepGroups
    graph: UnitGraph
    coverage: list[CoverageRow]
    plan: Plan
    inputs: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """What the run's manifest says about the model, JSON-ready."""
        return {"inputs": self.inputs, "plan": self.plan.to_dict(), "units": self.graph.names}


def open_model(
    config: Config,
    pipeline: Any = None,
    inputs: Inputs | None = None,
    earlier_plan: Mapping[str, Any] | None = None,
) -> OpenedModel:
    """Open the pretrained model, build its quantized twin, and check everything that can be wrong with either.

    Nothing is written.

    Args:
        config: the run's configuration.
        pipeline: the diffusers pipeline; None opens `config.model`.
        inputs: as in `quantize`.
        earlier_plan: plan in the manifest of a run that goes on, whose measured memory is taken over.

    Raises:
        UserError: the settings or the pipeline cannot be worked with.
    """
    check_methods(config)
    load_extensions(config.extensions)
    if pipeline is None:
        pipeline = _open_pipeline(config)
    name, full = find_denoiser(pipeline)
    refuse_adapters(pipeline)
    full.requires_grad_(False).eval()
    pipeline.to(choose_device(config.trainer))
    sampling = make_sampling(pipeline, config.conditioning, inputs)
    probed = probe(full, sampling, config.calibration.sampler)
    if config.evaluation.sampler is not None:
        probe(full, sampling, config.evaluation.sampler, "evaluation.sampler")
    features = open_features(config.evaluation, sampling.channels(full))
    hashes = _input_hashes(config, pipeline, sampling, features)

    # the same module tree, layers replaced, every one accounted for
    boundaries = group_boundaries(probed.timesteps.tolist(), config.quantization.activation.timestep_groups)
    timestep_groups = TimestepGroups(boundaries)
    quantized = shared_copy(full)
    coverage = quantize_denoiser(quantized, config.quantization, timestep_groups)

    first = probed.flat()[: 2 * probed.halves]
    traced = first.to(next(full.parameters()).device)
    graph = trace_units(full, lambda: traced.predict(full), traced.x)
    coverage = foresee_calls(quantized, lambda: traced.predict(quantized), coverage)
    check_stop(config, graph.names)
    others = other_networks(pipeline, name)
    plan = make_plan(config, full, others, graph, coverage, first, probed.num_steps, earlier_plan)
    return OpenedModel(
        config, pipeline, name, full, quantized, sampling, timestep_groups, graph, coverage, plan, hashes
    )


def collect_trajectories(model: OpenedModel, run: Run, advance: Advance | None = None) -> Trajectories:
    """Collect the calibration data: the denoiser inputs that the full-precision sampler visits.

    Args:
        model: the opened model.
        run: keeps the trajectories; those that it has are read.
        advance: told the number of trajectories just done, `len(config.calibration.indices)` in all.
    """
    config, indices = model.config, model.config.calibration.indices
    if config.cache_dir is not None:
        return shared_trajectories(config.cache_dir, config, model.full, model.sampling, advance)
    return stored_trajectories(run.files.trajectories, config, model.full, model.sampling, indices, advance)


def calibrate(
    model: OpenedModel, trajectories: Trajectories, run: Run, callbacks: Sequence[pl.Callback] = ()
) -> Calibrated | None:
    """Calibrate the quantized denoiser: rounds, and in each round the units in execution order.

    Args:
        model: the opened model, whose `quantized` is set and learned.
        trajectories: calibration data, held-out trajectories last.
        run: keeps the state of every finished unit.
        callbacks: as in `quantize`.

    Returns:
        What was done; None if `trainer.stop_after` ended it early.

    Raises:
        UserError: the full-precision model's own trajectories are not finite.
    """
    setup = Setup(
        config=model.config,
        full=model.full,
        quantized=model.quantized,
        sampling=model.sampling,
        graph=model.graph,
        timestep_groups=model.timestep_groups,
        limits=model.plan.limits,
        files=run.files,
    )
    with compiled_kernels(model.config.reconstruction.compile_kernels):
        return run_rounds(setup, trajectories, callbacks)


def save(model: OpenedModel, run: Run) -> Path:
    """Round the quantized denoiser to integers and write the artifact: the pipeline with it in its denoiser's place.

    Args:
        model: the opened model, calibrated.
        run: where to.

    Returns:
        The artifact's directory, for `load_quantized`.
    """
    freeze(model.quantized)
    metadata = {"config": settings_of_result(model.config), "coverage": len(model.coverage)}
    on_main(lambda: save_artifact(model.pipeline, model.name, model.quantized, run.files.artifact, metadata))
    return run.files.artifact


def measure(model: OpenedModel, run: Run, advance: Advance | None = None) -> Evaluation:
    """Measure what quantization costs: error of the noise, images from the same noise, FID and the other metrics.

    Args:
        model: the opened model, saved.
        run: keeps finished batches of images.
        advance: told the number of samples just done, `planned_samples(config.evaluation)` in all.
    """
    config = model.config
    with compiled_kernels(config.reconstruction.compile_kernels):
        return evaluate(
            model.full,
            model.quantized,
            model.sampling,
            config.calibration.sampler,
            config.evaluation,
            config.seed,
            run.files.evaluation,
            advance,
        )


def report(model: OpenedModel, calibrated: Calibrated, metrics: Evaluation, run: Run) -> dict[str, Any]:
    """Write report.md, metrics.json, plots and a grid of images.

    Args:
        model: the opened model.
        calibrated: what was done in calibration.
        metrics: what was measured.
        run: where to.

    Returns:
        What metrics.json holds.
    """

    def write() -> dict[str, Any]:
        rows = [x for x in (metrics.full_samples, metrics.quantized_samples) if x is not None]
        pictures = [to_images(row[: model.config.logging.grid_images]) for row in rows]
        save_grid(pictures[0], pictures[1], run.directory / "samples" / "grid.png")
        kept = {name: x.mul(255).round().byte() for name, x in zip(("full", "quantized"), pictures, strict=True)}
        run.files.images.save(kept)
        sizes = {"full": denoiser_bytes(model.full), "quantized": artifact_sizes(run.files.artifact)}
        content = metrics.to_dict() | {"bytes": sizes, "peak_memory": peak_memory()}
        seconds = calibrated.seconds() | metrics.seconds
        return write_report(run.directory, content, model.coverage, seconds, calibrated.units, calibrated.rounds)

    return on_main(write)
