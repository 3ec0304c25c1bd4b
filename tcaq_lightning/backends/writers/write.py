"""Write an artifact's denoiser as a file of weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tcaq_lightning.backends.export import NAME, SUFFIXES, Exported
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.backends.placement import put_in_place, target_file
from tcaq_lightning.backends.writers.base import WRITERS, split
from tcaq_lightning.backends.writers.original_names import with_original_names
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import find_denoiser

SHOWN = 8
"""Layers that are listed by name."""


@torch.no_grad()
def write_checkpoint(
    path: str, output: Path, file_format: str, strict: bool = False, original: bool = False
) -> Exported:
    """Write an artifact's denoiser as a file that another tool reads.

    Args:
        path: the artifact.
        output: a file with the format's suffix, or a directory.
        file_format: one of `WRITERS`.
        strict: refuse to write layers in float that the format cannot hold.
        original: name tensors as the model's original repository does, not as diffusers does.

    Raises:
        UserError: no artifact, a package that is not installed, something that no file of weights can hold, or no
            layer at all that this format holds.
    """
    writer = WRITERS[file_format]()
    writer.check()
    target = target_file(
        output, NAME, writer.suffix, (*SUFFIXES.values(), *(other.suffix for _, other in WRITERS.items()))
    )
    _, denoiser = find_denoiser(load_quantized(path))
    checkpoint = split(denoiser, writer)
    if original:
        checkpoint = with_original_names(denoiser, checkpoint)
    kept = [f"{name}: {reason}" for name, reason in checkpoint.kept.items()]
    if not checkpoint.held or (strict and kept):
        raise UserError(
            f"--format {file_format} cannot hold {kept[0] if kept else 'a denoiser without quantized layers'}; "
            f"expected {writer.wanted}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        writer.write(denoiser, checkpoint, Path(scratch) / target.name)
        files = put_in_place(Path(scratch), target.parent)
    lines = [f"{len(checkpoint.held)} of {len(checkpoint.held) + len(kept)} layers as codes, for {writer.consumers}"]
    lines += [f"in float: {line}" for line in kept[:SHOWN]]
    if len(kept) > SHOWN:
        lines.append(f"in float: {len(kept) - SHOWN} more")
    return Exported(files, lines)
