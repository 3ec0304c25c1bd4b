"""Full-precision images above quantized ones from the same noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class ImageGrid:
    """Show pairs of image rows in TensorBoard: full precision above, quantized below.

    Args:
        writer: the run's event writer.
        count: largest number of pairs.
    """

    def __init__(self, writer: SummaryWriter, count: int) -> None:
        self.writer = writer
        self.count = count

    def show(self, tag: str, full: Tensor, quantized: Tensor, step: int) -> None:
        """Add a grid of images (N, C, H, W) in [0, 1].

        Args:
            tag: in TensorBoard.
            full: (N, C, H, W) images of the full-precision model, in [0, 1].
            quantized: those of the quantized one.
            step: in TensorBoard.
        """
        rows = [torch.cat(list(images[: self.count]), dim=-1) for images in (full, quantized)]
        grid = torch.cat(rows, dim=-2)  # (C, 2H, N*W)
        if grid.shape[0] in (1, 3):
            self.writer.add_image(tag, grid, step)
