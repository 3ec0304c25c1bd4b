"""Quantizing what a caller built in Python."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from diffusers.utils import logging as diffusers_logging

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


def state_of_the_process() -> dict[str, Any]:
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    return {
        "loggers": [(x.name, x.level, x.disabled, x.propagate, list(x.handlers), list(x.filters)) for x in loggers],
        "filters": list(warnings.filters),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "frozen": gc.get_freeze_count(),
        "bars": diffusers_logging.is_progress_bar_enabled(),
    }


def state_of_the_pipeline(pipeline: DDPMPipeline) -> dict[str, Any]:
    modules, parameters = list(pipeline.unet.modules()), list(pipeline.unet.parameters())
    return {
        "training": [m.training for m in modules],
        "gradients": [(p.requires_grad, p.grad) for p in parameters],
        "places": [(id(p), p.device, p.dtype) for p in parameters],
        "values": [p.detach().clone().tolist() for p in parameters],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
        "scheduler": {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(pipeline.scheduler).items()},
        "attributes": sorted(vars(pipeline)),
    }


def labels(indices: Sequence[int]) -> dict[str, Any]:
    return {"class_labels": torch.tensor(list(indices)) % 3}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """The caller's own number of threads, which is not the configuration's."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_denoiser_with_arguments_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DDPMPipeline hands over no labels: the caller's inputs do, in calibration as in the measurements.

    Nothing of the caller's is left changed.
    """
    pipeline, steps = DDPMPipeline(labelled_unet(), DDIMScheduler()), Steps()
    seen: list[torch.Tensor] = []
    pipeline.unet.class_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    settings = config()
    settings.trainer.threads = 1
    logging.getLogger("pytorch_lightning").setLevel(logging.INFO)
    pipeline.unet.train()
    before = state_of_the_process(), state_of_the_pipeline(pipeline), settings.to_dict()
    quantized = quantize(pipeline, settings, tmp_path / "run", callbacks=[steps], inputs=labels)
    known = {entry[0] for entry in before[0]["loggers"]}
    after = state_of_the_process(), state_of_the_pipeline(pipeline), settings.to_dict()
    after[0]["loggers"] = [
        entry for entry in after[0]["loggers"] if entry[0] in known
    ]  # modules imported since have own
    for then, now in zip(before, after, strict=True):
        assert [key for key in then if then[key] != now[key]] == []
    assert capsys.readouterr().out == ""
    pipeline.unet.eval()
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
