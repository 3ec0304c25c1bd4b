"""Command: export an artifact for other engines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from tcaq_lightning.backends.export import SUFFIXES, export_artifact
from tcaq_lightning.backends.writers.base import WRITERS
from tcaq_lightning.backends.writers.write import write_checkpoint
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.command import at_least, set_threads
from tcaq_lightning.runtime.extensions import load_extensions


def export(
    path: str,
    output: Path,
    format: str = "onnx",  # noqa: A002 - the option's name
    four_bit: bool = True,
    tokens: int | None = None,
    latents: list[int] | None = None,
    allow_float: bool = False,
    strict: bool = False,
    names: Literal["diffusers", "original"] = "diffusers",
    threads: int | None = None,
    extensions: list[str] | None = None,
) -> None:
    """Export the denoiser of an artifact as one graph of integers for all timesteps, or as a file of weights.

    A graph is opened in the engines that are installed, and the kernel of every quantized product is listed. If one
    fell back to float that is not meant to, nothing is written. Of a file of weights, the layers are listed that it
    cannot hold as codes and that stand in it in float.

    Args:
        path: quantized artifact.
        output: file ending in the format's suffix, or a directory.
        format: onnx, one ONNX file with QuantizeLinear and DequantizeLinear; openvino, OpenVINO's IR; or weights for
            other tools: gguf, comfy.
        four_bit: store codes of at most 4 bits in 4 bits; else in 8, for engines without 4-bit integers.
        tokens: length of the context, where the denoiser attends to one; without it, the pipeline's own.
        latents: height and width of the noisy sample, such as [64,96]; without it, the denoiser's own.
        allow_float: write the graph although products fell back to float.
        strict: refuse a file of weights that would hold a quantized layer in float.
        names: of the tensors in a file of weights: diffusers' own, or those of the model's original repository, which
            ComfyUI and stable-diffusion.cpp want (Flux, Stable Diffusion 3).
        threads: CPU threads; without it, the engines' choice.
        extensions: Python files or modules of your own that register parts, imported first.

    Example:
        python -m tcaq_lightning export runs/quickstart/quantized exported --format openvino
    """
    at_least(1, 10**6, tokens=tokens)
    if latents is not None and (len(latents) != 2 or min(latents) < 1 or max(latents) > 65_536):
        raise UserError(f"--latents: expected a height and a width in 1..65536, such as [64,96], got {latents}")
    set_threads(threads)
    load_extensions(extensions or [])
    if format not in (*SUFFIXES, *WRITERS):
        raise UserError(f"--format must be one of {', '.join((*SUFFIXES, *WRITERS))}, got {format!r}")
    size = None if latents is None else (latents[0], latents[1])
    if format in WRITERS:
        exported = write_checkpoint(path, output, format, strict, names == "original")
    else:
        exported = export_artifact(path, output, format, four_bit, tokens, size, allow_float, threads)
    sys.stdout.write("\n".join([*exported.lines, *(f"wrote {file}" for file in exported.files)]) + "\n")
