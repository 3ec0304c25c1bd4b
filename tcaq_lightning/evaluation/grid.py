"""Images side by side, as a tensor for TensorBoard and as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from tcaq_lightning.runtime.files import replacing

GAP = 2
"""White pixels between images."""
MIN_SIZE = 56
"""Smaller images are enlarged to about this many pixels in a PNG."""
LABELS = ("full precision", "quantized")


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Tile images row by row, `GAP` white pixels apart; places left over in the last row are white.

    Args:
        images: (N, C, H, W) in [0, 1].
        columns: images a row.

    Returns:
        (C, H', W').

    >>> image_grid(torch.zeros(5, 1, 8, 8), columns=3).shape
    torch.Size([1, 18, 28])
    """
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    blank = images.new_ones(rows * columns - count, channels, height, width)
    cells = F.pad(torch.cat([images, blank]), (0, GAP, 0, GAP), value=1.0)
    cells = cells.view(rows, columns, channels, height + GAP, width + GAP).permute(2, 0, 3, 1, 4)  # (C, R, H, K, W)
    return cells.reshape(channels, rows * (height + GAP), columns * (width + GAP))[:, :-GAP, :-GAP]


def save_images(images: Tensor, path: Path, columns: int) -> None:
    """Write a plain grid as PNG.

    Args:
        images: (N, C, H, W) in [0, 1].
        path: the file, written atomically.
        columns: images a row.
    """
    _write(_picture(image_grid(_enlarged(images), columns)), path)


def save_grid(full_images: Tensor, quantized_images: Tensor, path: Path, columns: int = 8) -> None:
    """Write pairs of rows as PNG: full precision above, the same noises by the quantized model below.

    Args:
        full_images: (N, C, H, W) in [0, 1].
        quantized_images: likewise.
        path: the file, written atomically.
        columns: images a row.
    """
    save_rows(dict(zip(LABELS, (full_images, quantized_images), strict=True)), path, columns)


def save_rows(images: Mapping[str, Tensor], path: Path, columns: int = 8) -> None:
    """Write a row for each set of images as PNG, those of the same noises below each other.

    Args:
        images: by label, (N, C, H, W) in [0, 1]; of more than `columns` images each, rows go on further down.
        path: the file, written atomically.
        columns: images a row.
    """
    blocks = zip(*(torch.split(members, columns) for members in images.values()), strict=True)
    rows = [_picture(image_grid(_enlarged(row), columns)) for block in blocks for row in block]
    labels = list(images)
    draw = ImageDraw.Draw(rows[0])
    margin = 2 * GAP + max(int(draw.textlength(label)) for label in labels)
    height, last = rows[0].height, len(labels) - 1
    steps = [height + (4 * GAP if i % len(labels) == last else GAP) for i in range(len(rows))]  # blocks stand apart
    canvas = Image.new(rows[0].mode, (margin + rows[0].width, sum(steps) - 4 * GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        top = sum(steps[:i])
        canvas.paste(row, (margin, top))
        draw.text((GAP, top + height // 2), labels[i % len(labels)], fill="black", anchor="lm")
    _write(canvas, path)


def _enlarged(images: Tensor) -> Tensor:
    """Displayable images, small ones enlarged; channels that are no colours, such as latents, are averaged."""
    if images.shape[1] not in {1, 3}:
        images = images.mean(dim=1, keepdim=True)
    factor = max(1, MIN_SIZE // max(images.shape[-2:]))
    return images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def _picture(grid: Tensor) -> Image.Image:
    pixels = grid.detach().cpu().float().nan_to_num().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).contiguous().numpy())


def _write(picture: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
