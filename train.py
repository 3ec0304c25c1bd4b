"""Quantize a diffusion model: calibrate on its own samples, write an integer artifact, show what it cost.

    python train.py --config configs/fashion_mnist_w4a8.yaml                       the main job
    python train.py --config configs/fashion_mnist_w4a8.yaml --dry_run             units, bits, memory, time
    python train.py --config … --quantization.weight.bits 6 --run_dir runs/w6      any key can be given
    python train.py --config … --trainer.devices 4                                 4 GPUs
    torchrun --nproc_per_node 4 --nnodes 2 … train.py --config …                   2 nodes; under SLURM: srun python …

The same command again goes on where the last one stopped, however it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tcaq_lightning.api import run_job, sketch_job
from tcaq_lightning.cli import parse_config
from tcaq_lightning.models.pipelines import open_pipeline
from tcaq_lightning.runtime.distributed.launch import launched
from tcaq_lightning.runtime.exit_codes import run_cli
from tcaq_lightning.runtime.lightning import quiet_lightning


def main() -> None:
    """Run the main job, or what is left of it, on as many devices as it is given."""
    config, dry_run = parse_config()
    quiet_lightning()
    model = config.model
    if dry_run and model.architecture is not None and not Path(model.path).exists():
        sketch_job(config)
        return
    with launched(config):
        run_job(config, lambda: open_pipeline(model.path, model.variant, getattr(torch, model.dtype)), dry_run)


if __name__ == "__main__":
    sys.exit(run_cli(main))
