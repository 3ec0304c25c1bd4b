"""Quantizing what a caller built in Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from tcaq_lightning import quantize
from tcaq_lightning.config import ActivationConfig as Activation
from tcaq_lightning.config import (
    CalibrationConfig,
    Config,
    EvaluationConfig,
    LoggingConfig,
    QuantizationConfig,
    ReconstructionConfig,
    SamplerConfig,
    TrainerConfig,
)
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.parts import quant_layers


class Steps(pl.Callback):
    """Counts the optimisation steps of all fits."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1


def labelled_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=3,
    )


def config() -> Config:
    return Config(
        calibration=CalibrationConfig(2, 1, 1, sampler=SamplerConfig(num_steps=2, options={"clip_sample": False})),
        quantization=QuantizationConfig(activation=Activation(timestep_groups=2)),
        reconstruction=ReconstructionConfig(iterations=6, batch_size=4),
        evaluation=EvaluationConfig(num_trajectories=1, num_images=2),
        logging=LoggingConfig(tensorboard=False),
        trainer=TrainerConfig(accelerator="cpu"),
    )


def labels(indices: Sequence[int]) -> dict[str, Any]:
    return {"class_labels": torch.tensor(list(indices)) % 3}


def test_a_denoiser_with_arguments_of_its_own(tmp_path: Path) -> None:
    """DDPMPipeline hands over no labels: the caller's inputs do, in calibration as in the measurements."""
    pipeline, steps = DDPMPipeline(labelled_unet(), DDIMScheduler()), Steps()
    seen: list[torch.Tensor] = []
    pipeline.unet.class_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    quantized = quantize(pipeline, config(), tmp_path / "run", callbacks=[steps], inputs=labels)
    assert {int(label) for batch in seen for label in batch} == {0, 1, 2}
    layers = quant_layers(quantized.unet)
    assert "conv_in" in layers
    assert not quant_layers(pipeline.unet)
    units = len(list((tmp_path / "run/rounds/00/units").iterdir()))
    assert 0 < steps.count <= 6 * units
    assert (tmp_path / "run/report.md").is_file()

    x, t = torch.randn(2, 1, 8, 8), torch.tensor(500)
    again = quantize(pipeline, config(), tmp_path / "run", inputs=labels)  # finished: opened, nothing run
    with torch.no_grad():
        outputs = [m.unet(x, t, **labels([0, 1])).sample for m in (quantized, again, pipeline)]
    assert torch.equal(outputs[0], outputs[1])
    assert 0 < (outputs[0] - outputs[2]).square().sum() < 0.1 * outputs[2].square().sum()


def test_a_pipeline_is_not_returned_half_done(tmp_path: Path) -> None:
    stopping = dataclasses.replace(config(), trainer=TrainerConfig(accelerator="cpu", stop_after="conv_in"))
    with pytest.raises(UserError, match=r"trainer\.stop_after is 'conv_in'"):
        quantize(DDPMPipeline(labelled_unet(), DDIMScheduler()), stopping, tmp_path / "run", inputs=labels)
    assert not (tmp_path / "run").exists()


def test_without_the_inputs_it_is_told_what_is_missing(tmp_path: Path) -> None:
    pipeline = DDPMPipeline(labelled_unet(), DDIMScheduler())
    with pytest.raises(UserError, match="no class labels for its class-conditional unet"):
        quantize(pipeline, config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
