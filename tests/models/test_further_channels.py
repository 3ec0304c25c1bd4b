"""Denoisers that take more channels than they predict, such as those of inpainting, are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from tcaq_lightning.config import ConditioningConfig, SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.sampling import make_sampling
from tcaq_lightning.models.trajectories import probe
from tests.text_models import make_text_model


@pytest.mark.parametrize("channels", [8, 9])
def test_refused(channels: int, tmp_path: Path) -> None:
    pipeline = make_text_model("Stable Diffusion", tmp_path)
    settings = dict(pipeline.unet.config) | {"in_channels": channels}
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(settings))
    (tmp_path / "prompts.txt").write_text("a bag\n")
    sampling = make_sampling(pipeline, ConditioningConfig(prompts=tmp_path / "prompts.txt", guidance_scale=3.0))
    with pytest.raises(UserError, match=r"^(calibration\.sampler|model\.path): .*UNet2DConditionModel") as caught:
        probe(pipeline.unet, sampling, SamplerConfig(num_steps=4))
    assert "\n" not in str(caught.value)
