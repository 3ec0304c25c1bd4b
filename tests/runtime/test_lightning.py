from __future__ import annotations

from unittest import mock

import torch
from pytorch_lightning.demos.boring_classes import BoringModel

from tcaq_lightning.config import TrainerConfig
from tcaq_lightning.runtime.lightning import make_trainer


def test_a_module_stays_where_it_is_when_its_fit_ends() -> None:
    """Lightning would move it to the CPU; a unit goes on being used, and shares weights with the whole denoiser."""
    module = BoringModel()
    trainer = make_trainer(TrainerConfig(accelerator="cpu"), [], max_steps=1, device=torch.device("cpu"))
    with mock.patch.object(BoringModel, "cpu", side_effect=AssertionError) as moved:
        trainer.fit(module)
    assert trainer.global_step == 1
    assert not moved.called
