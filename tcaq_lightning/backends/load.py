"""Open an artifact on one of the backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tcaq_lightning.artifact.directory import open_artifact
from tcaq_lightning.backends.base import find_backend
from tcaq_lightning.errors import UserError


def load_quantized(
    path: str | Path, device: torch.device | str | None = None, backend: str = "torch", **options: Any
) -> DiffusionPipeline:
    """Open an artifact as an ordinary diffusers pipeline with an integer denoiser.

    In PyTorch it computes the same bits as the denoiser that was saved. Nothing is unpickled and no network is used.

    Args:
        path: the artifact's directory, such as RUN_DIR/quantized.
        device: where to; the CPU by default.
        backend: what runs the denoiser: `torch`, simulating integers in float32; `torchao`, the same with the products
            of linear layers on torchao's integer tensors, meant for CUDA and tested on the CPU alone; `openvino` or
            `onnxruntime`, on integer kernels of the CPU; or another one that is registered (`docs/extending.md`).
        options: of the backend. Of the first two: `packed`, whether weights stay packed in memory as they are on disk,
            each layer unpacking its own when it runs; True by default, and the same bits are computed. Of the engines:
            as in `EngineBackend.build`.

    Returns:
        The pipeline, its denoiser without gradients and in evaluation mode.

    Raises:
        UserError: no artifact there, another format version, a missing or damaged file, an unknown backend or option,
            or one that is not installed.
    """
    runner = find_backend(backend)
    if unknown := sorted(set(options) - set(runner.options)):
        known = ", ".join(runner.options) or "none"
        raise UserError(f"{unknown[0]}: backend {backend!r} has no such option; it has {known}")
    runner.check()
    opened = open_artifact(path, device, packed=options.get("packed", True))
    setattr(opened.pipeline, opened.denoiser_name, runner.build(opened, options))
    return opened.pipeline
