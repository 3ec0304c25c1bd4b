from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.images import ImageWriter, open_images, to_pixels
from tests.evaluation.inception_weights import pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_written_pictures_are_read_bit_for_bit(channels: int, tmp_path: Path) -> None:
    pixels = pictures(5, size=8, channels=channels)
    writer = ImageWriter(tmp_path / "out", "a")
    writer.write(range(2), pixels[:2])
    assert writer.has(range(2))
    assert not writer.has(range(3))
    writer.write(range(2, 5), pixels[2:])
    images = open_images(tmp_path / "out", "images")
    assert (len(images), images.shape) == (5, (channels, 8, 8))
    assert torch.equal(images.read(range(5)), pixels)
    assert torch.equal(images.read([3, 1]), pixels[[3, 1]])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3])
def test_array_is_read_bit_for_bit(save: Any, channels: int, tmp_path: Path) -> None:
    pixels = pictures(5, size=8, channels=channels)
    save(tmp_path / "a.npz", pixels.permute(0, 2, 3, 1).numpy(), labels=np.arange(5))
    images = open_images(tmp_path / "a.npz", "images")
    assert (len(images), images.shape) == (5, (channels, 8, 8))
    assert torch.equal(images.read(range(1, 4)), pixels[1:4])
    assert torch.equal(images.read([0]), pixels[:1])  # backwards


def test_every_byte_survives_samples_and_rounding_is_half_up() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_pixels(levels / 127.5 - 1).int(), levels.int())
    exact = (levels[:-1].double() + 0.5) / 255
    above, below = ((exact + d) * 2 - 1 for d in (1e-6, -1e-6))
    assert torch.equal(to_pixels(above).int(), levels[1:].int())
    assert torch.equal(to_pixels(below).int(), levels[:-1].int())
    assert to_pixels(torch.tensor([-7.0, 7.0, float("nan")])).tolist() == [0, 255, 0]


def test_order_is_that_of_the_names_below_the_folder(tmp_path: Path) -> None:
    for name, value in (("b/1.png", 2), ("a/2.png", 1), ("a/10.png", 0), ("c.PNG", 3)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (2, 2), value).save(path, format="PNG")
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images(tmp_path, "images")
    assert images.read(range(4))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    before = images.identity
    Image.new("L", (2, 2), 9).save(tmp_path / "c.PNG", format="PNG", compress_level=0)
    assert open_images(tmp_path, "images").identity != before


def damaged(tmp_path: Path, kind: str) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(pictures(1, size=64, seed=i)[0].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    path, array = folder / "1.png", tmp_path / "a.npz"
    if kind == "size":
        Image.new("RGB", (64, 32)).save(path)
    elif kind == "channels":
        Image.new("L", (64, 64)).save(path)
    elif kind == "alpha":
        Image.new("RGBA", (64, 64)).save(path)
    elif kind == "16 bits":
        Image.new("I;16", (64, 64)).save(path)
    elif kind == "text":
        path.write_text("no image")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "empty":
        for file in folder.iterdir():
            file.unlink()
    elif kind == "nowhere":
        return tmp_path / "nowhere"
    elif kind == "no arr_0":
        np.savez(array, images=np.zeros((2, 4, 4, 3), np.uint8))
    elif kind == "floats":
        np.savez(array, np.zeros((2, 4, 4, 3)))
    elif kind == "channels first":
        np.savez(array, np.zeros((2, 3, 4, 4), np.uint8))
    elif kind == "objects":
        np.savez(array, np.array([None, 1], dtype=object))
    elif kind == "no npz":
        array.write_bytes(b"PK nothing")
    elif kind == "short npz":
        with zipfile.ZipFile(array, "w") as archive, archive.open("arr_0.npy", "w") as stream:
            np.lib.format.write_array_header_1_0(
                stream, {"descr": "|u1", "fortran_order": False, "shape": (5, 4, 4, 3)}
            )
            stream.write(bytes(100))
    return array if array.exists() else folder


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("size", r"1\.png"),
        ("channels", r"1\.png"),
        ("alpha", r"1\.png.*RGBA"),
        ("16 bits", r"1\.png"),
        ("text", r"1\.png"),
        ("truncated", r"1\.png"),
        ("empty", "got none"),
        ("nowhere", "nowhere"),
        ("no arr_0", "arr_0"),
        ("floats", "float64"),
        ("channels first", r"\(2, 3, 4, 4\)"),
        ("objects", r"a\.npz"),
        ("no npz", r"a\.npz"),
        ("short npz", r"expected 5 images in .*a\.npz"),
    ],
)
def test_mistakes_are_named_in_one_line(kind: str, text: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, kind)

    def read() -> None:
        images = open_images(path, "evaluation.reference")
        images.read(range(len(images)))

    with pytest.raises(UserError, match=text) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_pictures_of_another_model_are_not_mixed(tmp_path: Path) -> None:
    ImageWriter(tmp_path / "out", "a").write(range(1), pictures(1))
    assert ImageWriter(tmp_path / "out", "a").has(range(1))
    with pytest.raises(UserError, match="save_images"):
        ImageWriter(tmp_path / "out", "b")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="save_images"):
        ImageWriter(tmp_path / "mine", "a")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
