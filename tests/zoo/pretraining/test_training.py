from __future__ import annotations

import json
from pathlib import Path

import pytest

from tcaq_lightning.errors import UserError
from tcaq_lightning.zoo.pretraining.autoencoder import AutoencoderRecipe
from tcaq_lightning.zoo.pretraining.latent import LatentRecipe
from tcaq_lightning.zoo.pretraining.training import Recipe, replace_files


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [
        (Recipe, {"steps": 0}),
        (Recipe, {"batch_size": 0}),
        (Recipe, {"lr": 0.0}),
        (Recipe, {"warmup": -1}),
        (Recipe, {"ema_decay": 1.0}),
        (Recipe, {"seed": -1}),
        (AutoencoderRecipe, {"steps": 0}),
        (AutoencoderRecipe, {"kl_weight": -0.1}),
        (AutoencoderRecipe, {"perceptual_weight": -1.0}),
        (LatentRecipe, {"label_dropout": 1.5}),
    ],
)
def test_recipe_refuses(recipe: type[Recipe], setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(setting))} must be"):
        recipe(**({"steps": 1} | setting))  # type: ignore[arg-type]


def test_files_are_replaced_one_by_one_and_name_no_path_of_this_machine(tmp_path: Path) -> None:
    target = tmp_path / "model"
    (target / "part").mkdir(parents=True)
    (target / "part" / "config.json").write_text("old")
    (target / "other").write_text("stays")

    def save(directory: Path) -> None:
        (directory / "part").mkdir(parents=True)
        (directory / "part" / "config.json").write_text(json.dumps({"_name_or_path": "/home/me", "a": 1}))

    replace_files(save, target)
    assert json.loads((target / "part" / "config.json").read_text()) == {"a": 1}
    assert (target / "other").read_text() == "stays"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_files(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")

    def save(directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{")
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - the one that is raised above
        replace_files(save, target)
    assert (target / "config.json").read_text() == "old"
