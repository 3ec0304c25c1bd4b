"""Open an artifact on one of the backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from tcaq_lightning.artifact.directory import OpenedArtifact, open_artifact
from tcaq_lightning.errors import UserError

BACKENDS = ("torch", "torchao", "openvino", "onnxruntime")
"""What a denoiser can run on."""
ENGINE_OPTIONS = ("model", "threads", "provider", "tokens", "latents")
OPTIONS = {"torch": ("packed",), "torchao": ("packed",), "openvino": ENGINE_OPTIONS, "onnxruntime": ENGINE_OPTIONS}


def load_quantized(
    path: str | Path, device: torch.device | str | None = None, backend: str = "torch", **options: Any
) -> DiffusionPipeline:
    """Open an artifact as an ordinary diffusers pipeline with an integer denoiser.

    In PyTorch it computes the same bits as the denoiser that was saved. Nothing is unpickled and no network is used.

    Args:
        path: the artifact's directory, such as RUN_DIR/quantized.
        device: where to; the CPU by default.
        backend: what runs the denoiser: `torch`, simulating integers in float32; `torchao`, the same with the products
            of linear layers on torchao's integer tensors, meant for CUDA and tested on the CPU alone; or, on integer
            kernels of the CPU, `openvino` or `onnxruntime`.
        options: of the first two: `packed`, whether weights stay packed in memory as they are on disk, each layer
            unpacking its own when it runs; True by default, and the same bits are computed. Of the other two: `model`,
            a file that `python -m tcaq_lightning export` wrote (without it the graph is made now); `threads`;
            `provider`, OpenVINO's device or ONNX Runtime's provider; `tokens`, length of the context of a denoiser that
            attends to one; `latents`, (height, width) of the noisy sample.

    Returns:
        The pipeline, its denoiser without gradients and in evaluation mode.

    Raises:
        UserError: no artifact there, another format version, a missing or damaged file, an unknown backend or option,
            or one that is not installed.
    """
    _check_options(backend, options)
    opened = open_artifact(path, device, packed=options.get("packed", True))
    if backend == "torchao":
        from tcaq_lightning.backends.torchao import map_linear_layers

        map_linear_layers(opened.denoiser)
    elif backend != "torch":
        setattr(opened.pipeline, opened.denoiser_name, _on_engine(opened, backend, options))
    return opened.pipeline


def _check_options(backend: str, options: dict[str, Any]) -> None:
    if backend not in BACKENDS:
        raise UserError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    known = OPTIONS[backend]
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"{unknown[0]}: backend {backend!r} has no such option; it has {', '.join(known)}")


def _on_engine(opened: OpenedArtifact, backend: str, options: dict[str, Any]) -> nn.Module:
    """What stands for the denoiser in the pipeline and runs its exported graph."""
    from tcaq_lightning.backends.engines import open_engine
    from tcaq_lightning.backends.graph.build import build_graph
    from tcaq_lightning.backends.graph.inputs import pipeline_sizes
    from tcaq_lightning.backends.stand_in import EngineDenoiser

    denoiser: Any = opened.denoiser
    settings = {key: value for key, value in options.items() if key in ("threads", "provider")}
    if options.get("model") is not None:
        engine = open_engine(backend, Path(options["model"]), None, settings, opened.digest)
    else:
        sizes = pipeline_sizes(opened.pipeline, options.get("tokens"), options.get("latents"))
        content, info = build_graph(denoiser, opened.digest, sizes)
        engine = open_engine(backend, content, info, settings)
    stand_in: nn.Module = EngineDenoiser(engine, type(denoiser), denoiser.config).eval()
    return stand_in
