"""Quantize a diffusion model: calibrate on its own samples, write an integer artifact, show what it cost.

    python train.py --config configs/w4a8.yaml                                     the main job
    python train.py --config configs/w4a8.yaml --dry_run                           units, bits, memory, time
    python train.py --config … --quantization.weight.bits 6 --run_dir runs/w6      any key can be given
    python train.py --config … --trainer.devices 4                                 4 GPUs
    torchrun --nproc_per_node 4 --nnodes 2 … train.py --config …                   2 nodes; under SLURM: srun python …

The same command again goes on where the last one stopped, however it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
from rich.console import Console

from callbacks import (
    ActivationStatistics,
    DistributionFitting,
    EventLog,
    LearningCurves,
    Progress,
    RunLog,
    counting,
    log_results,
)
from tcaq_lightning.api import (
    OpenedModel,
    calibrate,
    check_finished,
    collect_trajectories,
    measure,
    open_model,
    report,
    save,
)
from tcaq_lightning.calibration.planning.plan import coverage_table
from tcaq_lightning.calibration.planning.sketch import sketch_run
from tcaq_lightning.calibration.run_dir import Run
from tcaq_lightning.cli import parse_config
from tcaq_lightning.config import Config
from tcaq_lightning.evaluation.evaluate import planned_samples
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.reports.headline import final_table
from tcaq_lightning.runtime.command import plain_console
from tcaq_lightning.runtime.distributed.collectives import is_main
from tcaq_lightning.runtime.distributed.launch import launched
from tcaq_lightning.runtime.exit_codes import run_cli
from tcaq_lightning.runtime.extensions import load_extensions
from tcaq_lightning.runtime.lightning import quiet_lightning


def main() -> None:
    """Run the main job, or what is left of it, on as many devices as it is given."""
    config, dry_run = parse_config()
    quiet_lightning()
    load_extensions(config.extensions)
    if dry_run and config.model.architecture is not None and not Path(config.model.path).exists():
        show_sketch(config)
        return
    with launched(config), Run(config) as run:
        train(config, run, plain_console(quiet=not is_main()), dry_run)


def train(config: Config, run: Run, console: Console, dry_run: bool) -> None:
    """The main job, as each rank runs it."""
    if run.finished and not dry_run:
        check_finished(config, run)
        console.print(f"{run.directory} is finished; nothing to do. See {run.directory / 'report.md'}")
        return

    # open: the pretrained pipeline and its quantized twin
    model = open_model(config, earlier_plan=run.manifest.get("plan"))
    console.print(model.plan.table())
    if dry_run:
        console.print(coverage_table(model.coverage))
        return
    model.plan.check(run.directory)
    run.start(**model.facts())

    # collect: the denoiser inputs that the full-precision sampler visits
    with counting(console, "trajectories", len(config.calibration.indices)) as advance:
        trajectories = collect_trajectories(model, run, advance)

    # calibrate: observe, initialize and reconstruct unit after unit, round after round
    logged = config.logging.tensorboard and is_main()
    writer = EventLog(run.directory / "tensorboard") if logged else None
    with watching(model, trajectories, console, writer) as callbacks:
        calibrated = calibrate(model, trajectories, run, callbacks)
    if calibrated is None:
        last = config.trainer.stop_after
        console.print(f"stopped after {last}; the same command without trainer.stop_after goes on", soft_wrap=True)
        return

    # save: integers and tables, as a pipeline that diffusers opens
    artifact = save(model, run)
    console.print(f"artifact: {artifact}; measuring it", soft_wrap=True)

    # measure: what quantization costs, on noise that calibration has not seen
    with counting(console, "evaluation", planned_samples(config.evaluation)) as advance:
        metrics = measure(model, run, advance)
    summary = report(model, calibrated, metrics, run)
    if writer is not None:
        log_results(writer, config, summary, metrics)
    console.print(final_table(summary))
    run.finish()


@contextmanager
def watching(
    model: OpenedModel, trajectories: Trajectories, console: Console, writer: EventLog | None
) -> Iterator[list[pl.Callback]]:
    """Show progress within; gives the callbacks, those that log only where there is a writer."""
    config = model.config
    with Progress(console, config.steps_by_round(), len(model.graph.names)) as progress:
        if writer is None:
            yield [progress]
            return
        held_out = trajectories.finals[config.calibration.num_trajectories :]
        yield [
            progress,
            ActivationStatistics(writer),
            DistributionFitting(writer),
            LearningCurves(writer, config.logging.every_n_steps),
            RunLog(writer, held_out, config.logging.grid_images),
        ]


def show_sketch(config: Config) -> None:
    """Print the plan of a model whose weights are not at hand."""
    console, sketch = plain_console(), sketch_run(config)
    console.print(sketch.plan.table())
    console.print(coverage_table(sketch.coverage))
    console.print(str(sketch), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))
