"""Command: write a published checkpoint as a model in diffusers layout."""

from __future__ import annotations

from pathlib import Path

from tcaq_lightning.runtime.command import plain_console
from tcaq_lightning.zoo.conversion import convert as conversion


def convert(
    source: Path, output: Path, architecture: str | None = None, ema: bool | None = None, tokenizer: str | None = None
) -> None:
    """Write a published checkpoint as a directory in diffusers layout: DDIM's repository, latent and Stable Diffusion.

    Args:
        source: checkpoint file, read without running any code of it.
        output: new directory.
        architecture: the checkpoint's own YAML file, or the name of a shipped architecture, such as ddim-cifar10;
            --config says the same.
        ema: whether to take the moving average of the weights; without it, if there is one.
        tokenizer: of Stable Diffusion: directory with vocab.json and merges.txt, or hub id.

    Example:
        python -m tcaq_lightning convert model-790000.ckpt models/cifar10 --architecture ddim-cifar10
    """
    record = conversion.convert(source, output, architecture, ema, tokenizer)
    parts = ", ".join(f"{name} {count:,}" for name, count in record["parameters"].items())
    plain_console(soft_wrap=True).print(f"{output}: {record['weights']}, parameters: {parts}", highlight=False)
