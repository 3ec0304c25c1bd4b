"""The main job from an opened pipeline to the report, as `train.py` and Python callers run it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from diffusers import DiffusionPipeline
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from tcaq_lightning.artifact.directory import artifact_sizes, freeze, save_artifact
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.calibration.planning.cost import DEVICE_TFLOPS
from tcaq_lightning.calibration.planning.plan import coverage_table, make_plan, sketch_plan
from tcaq_lightning.calibration.rounds import calibrate, calibration_trajectories
from tcaq_lightning.calibration.run_dir import Run, settings_of_result
from tcaq_lightning.calibration.state import Calibration, seconds_by_stage
from tcaq_lightning.config import Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.evaluate import evaluate, open_features, planned_samples
from tcaq_lightning.evaluation.grid import save_grid
from tcaq_lightning.models.architectures import (
    architecture_scheduler,
    example_samples,
    find_architecture,
    meta_denoiser,
)
from tcaq_lightning.models.pipelines import (
    denoiser_bytes,
    find_denoiser,
    make_scheduler,
    other_networks,
    quiet_diffusers,
    to_images,
)
from tcaq_lightning.models.sampling import Inputs, make_sampling
from tcaq_lightning.models.trajectories import probe
from tcaq_lightning.models.units import trace_units
from tcaq_lightning.nn.prepare import quantize as quantize_denoiser
from tcaq_lightning.nn.prepare import shared_copy
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, group_boundaries
from tcaq_lightning.reports.markdown import final_table, write_report
from tcaq_lightning.runtime.allocation_trace import SIZES
from tcaq_lightning.runtime.call_stack import with_room_for_frames
from tcaq_lightning.runtime.distributed.collectives import is_main, on_main
from tcaq_lightning.runtime.distributed.launch import launched
from tcaq_lightning.runtime.kernels import compiled_kernels
from tcaq_lightning.runtime.lightning import choose_device, quiet_lightning

ARTIFACT = "quantized"
"""Directory of the artifact in RUN_DIR."""


def quantize(
    pipeline: Any,
    config: Config,
    run_dir: str | Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
    inputs: Inputs | None = None,
) -> DiffusionPipeline:
    """Quantize a pipeline's denoiser: calibrate on its own samples, write an integer artifact, measure what it cost.

    The same call again resumes where the last one stopped, in `run_dir`; a finished run is opened.

    Args:
        pipeline: any diffusers pipeline from noise to images, such as `DDPMPipeline(unet, scheduler)`. Its denoiser is
            frozen and put on the device that `config.trainer` says.
        config: what a YAML file would say; `config.model` is taken down, not opened.
        run_dir: directory of everything that is written; None takes `config.run_dir`.
        callbacks: further Lightning callbacks of each unit's fit.
        inputs: for a denoiser with arguments that the pipeline's call does not know: they by the samples' numbers.

    Returns:
        The pipeline with its integer denoiser, as `load_quantized` opens it.

    Raises:
        UserError: settings, or a pipeline, that cannot be worked with.

    >>> from diffusers import DDPMPipeline
    >>> quantize(DDPMPipeline(unet, scheduler), Config(), "runs/mine")  # doctest: +SKIP
    """
    if run_dir is not None:
        config = dataclasses.replace(config, run_dir=Path(run_dir))
    if config.trainer.stop_after is not None:
        raise UserError(
            f"trainer.stop_after is {config.trainer.stop_after!r}, but `quantize` returns the whole pipeline; expected "
            "null: call `run_job` or train.py to stop early"
        )
    quiet_diffusers()
    quiet_lightning()
    with launched(config):
        run_job(config, lambda: pipeline, callbacks=callbacks, inputs=inputs)
    return load_quantized(config.run_dir / ARTIFACT)


def check_stop(config: Config, units: Sequence[str]) -> None:
    """See that the unit to stop after is one.

    Raises:
        UserError: it is not.
    """
    last = config.trainer.stop_after
    if last is not None and last not in units:
        near = difflib.get_close_matches(last, units, n=1, cutoff=0) or units[:1]
        raise UserError(
            f"trainer.stop_after: {last!r} is no unit of the model; expected one such as {near[0]}, or null"
        )


def sketch_job(config: Config) -> None:
    """Print the plan and the coverage of a model whose weights are not at hand, from `model.architecture`."""
    assert config.model.architecture is not None
    console = Console(log_path=False)
    architecture = find_architecture(config.model.architecture)
    denoiser = meta_denoiser(architecture)
    own = architecture_scheduler(architecture)
    timesteps = make_scheduler(own, config.calibration.sampler).timesteps.tolist()
    guidance = config.conditioning.guidance_scale
    halves = 2 if guidance is not None and guidance > 1 else 1
    context = TimestepGroups(group_boundaries(timesteps, config.quantization.activation.timestep_groups))
    coverage = quantize_denoiser(shared_copy(denoiser), config.quantization, context)
    samples = example_samples(denoiser, SIZES[1])
    graph = trace_units(denoiser, lambda: samples.predict(denoiser))
    check_stop(config, graph.names)
    plan = sketch_plan(config, denoiser, graph, coverage, samples, halves * len(timesteps))
    parameters = sum(p.numel() for p in denoiser.parameters())
    console.print(plan.table())
    console.print(coverage_table(coverage))
    console.print(
        f"{architecture.name}: {parameters / 1e6:,.1f} million parameters, from its configuration alone; time for "
        f"{plan.processes} x {DEVICE_TFLOPS:g} TFLOP/s, which is assumed",
        soft_wrap=True,
    )


def run_job(
    config: Config,
    open_model: Callable[[], Any],
    dry_run: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    inputs: Inputs | None = None,
) -> None:
    """The main job, as each rank runs it.

    Args:
        config: the run's configuration.
        open_model: opens the pipeline, where there is work to do.
        dry_run: print the plan and the coverage, and stop.
        callbacks, inputs: as in `quantize`.
    """
    run = Run(config)
    try:
        with_room_for_frames(lambda: _work(config, run, open_model, dry_run, callbacks, inputs))
    finally:
        run.release()


def _work(
    config: Config,
    run: Run,
    open_model: Callable[[], Any],
    dry_run: bool,
    callbacks: Sequence[pl.Callback],
    inputs: Inputs | None,
) -> None:
    from callbacks import ActivationStatistics, DistributionFitting, LearningCurves, Progress
    from callbacks.progress import counting
    from callbacks.run_log import RunLog, log_results

    console = Console(log_path=False, quiet=not is_main())
    run.read()
    if run.finished and not dry_run:
        console.print(f"{run.directory} is finished; nothing to do. See {run.directory / 'report.md'}")
        return

    # the pretrained model, and everything that can be wrong with it or with the settings
    pipeline = open_model()
    name, full = find_denoiser(pipeline)
    full.requires_grad_(False).eval()
    pipeline.to(choose_device(config.trainer))
    sampling = make_sampling(pipeline, config.conditioning, inputs)
    probed = probe(full, sampling, config.calibration.sampler)
    if config.evaluation.sampler is not None:
        probe(full, sampling, config.evaluation.sampler, "evaluation.sampler")
    open_features(config.evaluation, sampling.channels(full))

    # its quantized twin: same module tree, layers replaced, every one accounted for
    boundaries = group_boundaries(probed.timesteps.tolist(), config.quantization.activation.timestep_groups)
    context = TimestepGroups(boundaries)
    quantized = shared_copy(full)
    coverage = quantize_denoiser(quantized, config.quantization, context)
    first = probed.flat()[: 2 * probed.halves]
    traced = first.to(next(full.parameters()).device)
    graph = trace_units(full, lambda: traced.predict(full), traced.x)
    check_stop(config, graph.names)
    others = other_networks(pipeline, name)
    plan = make_plan(config, full, others, graph, coverage, first, probed.num_steps, run.manifest.get("plan"))
    console.print(plan.table())
    if dry_run:
        console.print(coverage_table(coverage))
        return
    run.start(plan=plan.to_dict(), units=graph.names)

    # calibration data: the denoiser inputs that the full-precision sampler visits
    calibration = config.calibration
    with counting(console, "trajectories", len(calibration.indices)) as advance:
        trajectories = calibration_trajectories(config, run, full, sampling, advance)

    # rounds and units
    writer = SummaryWriter(str(run.directory / "tensorboard")) if config.logging.tensorboard and is_main() else None
    curves = [LearningCurves(writer, graph.names, config.logging.every_n_steps)] if writer else []
    with Progress(console, config.steps_by_round(), len(graph.names)) as progress:
        held_out = trajectories.finals[calibration.num_trajectories :]
        work = Calibration(
            config=config,
            run=run,
            full=full,
            quantized=quantized,
            sampling=sampling,
            graph=graph,
            context=context,
            limits=plan.limits,
            trajectories=trajectories,
            listener=RunLog(progress, writer, held_out, config.logging.grid_images),
            observers=[ActivationStatistics(), DistributionFitting()],
            learners=[*curves, progress, *callbacks],
        )
        with compiled_kernels(config.reconstruction.compile_kernels):
            rounds = calibrate(work)
    if rounds is None:
        last = config.trainer.stop_after
        console.print(f"stopped after {last}; the same command without trainer.stop_after goes on", soft_wrap=True)
        return

    # the artifact, and what it costs
    artifact = run.directory / ARTIFACT
    freeze(quantized)
    metadata = {"config": settings_of_result(config), "coverage": len(coverage)}
    on_main(lambda: save_artifact(pipeline, name, quantized, artifact, metadata))
    console.print(f"artifact: {artifact}; measuring it", soft_wrap=True)
    cache = run.directory / "evaluation"
    with (
        compiled_kernels(config.reconstruction.compile_kernels),
        counting(console, "evaluation", planned_samples(config.evaluation)) as advance,
    ):
        metrics = evaluate(
            full, quantized, sampling, calibration.sampler, config.evaluation, config.seed, cache, advance
        )

    def show() -> None:
        images = [to_images(x) for x in (metrics.full_samples, metrics.quantized_samples) if x is not None]
        full_grid, quantized_grid = (x[: config.logging.grid_images] for x in images)
        save_grid(full_grid, quantized_grid, run.directory / "samples" / "grid.png")
        seconds = seconds_by_stage(work.records, rounds) | metrics.seconds
        content = metrics.to_dict() | {"bytes": {"full": denoiser_bytes(full), "quantized": artifact_sizes(artifact)}}
        summary = write_report(run.directory, content, coverage, seconds, work.records, rounds)
        if writer is not None:
            log_results(writer, config, summary, *images)
        console.print(final_table(summary))

    on_main(show)
    run.finish()
