from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tcaq_lightning.evaluation.grid import GAP, image_grid, save_grid, save_images


def test_every_image_is_where_it_belongs() -> None:
    images = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    grid = image_grid(images, columns=3)
    assert grid.shape == (3, 2 * 4 + GAP, 3 * 6 + 2 * GAP)
    for i, image in enumerate(images):
        top, left = i // 3 * (4 + GAP), i % 3 * (6 + GAP)
        assert torch.equal(grid[:, top : top + 4, left : left + 6], image)
    assert (grid[:, 4 + GAP :, 2 * (6 + GAP) :] == 1).all()


def test_fewer_images_than_columns() -> None:
    assert image_grid(torch.zeros(2, 1, 4, 4), columns=8).shape == (1, 4, 8 + GAP)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "L")])
def test_png_of_pairs(channels: int, mode: str, tmp_path: Path) -> None:
    black, grey = torch.zeros(5, channels, 28, 28), torch.full((5, channels, 28, 28), 0.5)
    path = tmp_path / "samples" / "grid.png"
    save_grid(black, grey, path, columns=4)
    with Image.open(path) as picture:
        assert picture.mode == mode
        right = picture.convert("L").crop((picture.width - 4 * 56 - 3 * GAP, 0, picture.width, picture.height))
        column = [right.getpixel((0, y)) for y in range(right.height)]
    runs = [value for i, value in enumerate(column) if i == 0 or value != column[i - 1]]
    assert runs == [0, 255, 128, 255, 0, 255, 128]
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_plain_png_survives_nan(tmp_path: Path) -> None:
    save_images(torch.full((3, 1, 64, 64), float("nan")), tmp_path / "a.png", columns=2)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (128 + GAP, 128 + GAP)
