"""Quantize a diffusion model: calibrate on its own samples, write an integer artifact, show what it cost.

    python train.py --config configs/fashion_mnist_w4a8.yaml                       the main job
    python train.py --config configs/fashion_mnist_w4a8.yaml --dry_run             units, bits, memory, time
    python train.py --config … --quantization.weight.bits 6 --run_dir runs/w6      any key can be given
    python train.py --config … --trainer.devices 4                                 4 GPUs
    torchrun --nproc_per_node 4 --nnodes 2 … train.py --config …                   2 nodes; under SLURM: srun python …

The same command again goes on where the last one stopped, however it stopped.
"""

from __future__ import annotations

import copy
import sys

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from callbacks import ActivationStatistics, DistributionFitting, LearningCurves, Progress
from callbacks.progress import counting
from callbacks.run_log import RunLog, log_results
from tcaq_lightning.alignment import calibrate, calibration_trajectories
from tcaq_lightning.artifact import artifact_sizes, freeze, save_artifact
from tcaq_lightning.calibration import Calibration, seconds_by_stage
from tcaq_lightning.cli import run_cli
from tcaq_lightning.config import Config
from tcaq_lightning.distributed import is_main, on_main
from tcaq_lightning.evaluation.evaluate import evaluate, open_features, planned_samples
from tcaq_lightning.evaluation.grid import save_grid
from tcaq_lightning.launch import launched
from tcaq_lightning.parsing import parse_config
from tcaq_lightning.pipelines import denoiser_bytes, find_denoiser, open_pipeline, to_images
from tcaq_lightning.plan import coverage_table, make_plan
from tcaq_lightning.quantize import quantize
from tcaq_lightning.report import final_table, write_report
from tcaq_lightning.run import Run, settings_of_result
from tcaq_lightning.sampling import make_sampling
from tcaq_lightning.timesteps import TimestepGroups, group_boundaries
from tcaq_lightning.trainers import choose_device, quiet_lightning
from tcaq_lightning.trajectories import probe
from tcaq_lightning.units import trace_units


def main() -> None:
    """Run the main job, or what is left of it, on as many devices as it is given."""
    config, dry_run = parse_config()
    quiet_lightning()
    with launched(config):
        calibrate_and_measure(config, dry_run)


def calibrate_and_measure(config: Config, dry_run: bool) -> None:
    """The main job, as each rank runs it."""
    console = Console(log_path=False, quiet=not is_main())
    run = Run(config)
    run.read()
    if run.finished and not dry_run:
        console.print(f"{run.directory} is finished; nothing to do. See {run.directory / 'report.md'}")
        return

    # the pretrained model, and everything that can be wrong with it or with the settings
    pipeline = open_pipeline(config.model.path, config.model.variant, getattr(torch, config.model.dtype))
    name, full = find_denoiser(pipeline)
    full.to(choose_device(config.trainer))
    sampling = make_sampling(pipeline, config.conditioning)
    probed = probe(full, sampling, config.calibration.sampler)
    if config.evaluation.sampler is not None:
        probe(full, sampling, config.evaluation.sampler, "evaluation.sampler")
    open_features(config.evaluation, sampling.channels(full))

    # its quantized twin: same module tree, layers replaced, every one accounted for
    boundaries = group_boundaries(probed.timesteps.tolist(), config.quantization.activation.timestep_groups)
    context = TimestepGroups(boundaries)
    quantized = copy.deepcopy(full)
    coverage = quantize(quantized, config.quantization, context)
    first = probed.flat()[: 2 * probed.halves]
    traced = first.to(full.device)
    graph = trace_units(full, lambda: traced.predict(full), traced.x)
    plan = make_plan(config, full, graph, coverage, first, probed.num_steps, run.manifest.get("plan"))
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
            learners=[*curves, progress],
        )
        rounds = calibrate(work)

    # the artifact, and what it costs
    artifact = run.directory / "quantized"
    freeze(quantized)
    metadata = {"config": settings_of_result(config), "coverage": len(coverage)}
    on_main(lambda: save_artifact(pipeline, name, quantized, artifact, metadata))
    console.print(f"artifact: {artifact}; measuring it", soft_wrap=True)
    cache = run.directory / "evaluation"
    with counting(console, "evaluation", planned_samples(config.evaluation)) as advance:
        metrics = evaluate(
            full, quantized, sampling, calibration.sampler, config.evaluation, config.seed, cache, advance
        )

    def show() -> None:
        images = [to_images(x) for x in (metrics.full_samples, metrics.quantized_samples) if x is not None]
        save_grid(*(x[: config.logging.grid_images] for x in images), run.directory / "samples" / "grid.png")
        seconds = seconds_by_stage(work.records, rounds) | metrics.seconds
        content = metrics.to_dict() | {"bytes": {"full": denoiser_bytes(full), "quantized": artifact_sizes(artifact)}}
        summary = write_report(run.directory, content, coverage, seconds, work.records, rounds)
        if writer is not None:
            log_results(writer, config, summary, *images)
        console.print(final_table(summary))

    on_main(show)
    run.finish()


if __name__ == "__main__":
    sys.exit(run_cli(main))
