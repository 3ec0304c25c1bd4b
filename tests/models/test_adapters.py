from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMPipeline, DDIMScheduler

from tcaq_lightning import quantize
from tcaq_lightning.config import Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.adapters import refuse_adapters
from tcaq_lightning.models.pipelines import open_pipeline
from tests.text_models import make_text_model
from tests.tiny_models import tiny_unet

peft = pytest.importorskip("peft")

KINDS: dict[str, Any] = {
    "LoRA": lambda layers: peft.LoraConfig(r=2, target_modules=layers),
    "DoRA": lambda layers: peft.LoraConfig(r=2, use_dora=True, target_modules=layers),
    "LoHa": lambda layers: peft.LoHaConfig(r=2, target_modules=layers),
    "LoKr": lambda layers: peft.LoKrConfig(r=2, target_modules=layers),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_refused_before_anything_is_planned(kind: str, tmp_path: Path) -> None:
    pipeline: Any = open_pipeline("fashion-mnist-latent")
    pipeline.unet.add_adapter(KINDS[kind](["to_q"]))
    with pytest.raises(
        UserError, match=r"^unet: expected no adapters .* fuse_lora\(\) and unload_lora_weights"
    ) as caught:
        quantize(pipeline, Config(), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))
    pipeline.unet.disable_adapters()
    with pytest.raises(UserError, match="unet: expected no adapters"):
        refuse_adapters(pipeline)
    if kind in ("LoRA", "DoRA"):
        pipeline.unet.fuse_lora()
        with pytest.raises(UserError, match="unet: expected no adapters"):
            refuse_adapters(pipeline)
    pipeline.unet.unload_lora()
    refuse_adapters(pipeline)


def test_other_networks_are_looked_at_too(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pipeline = make_text_model("Stable Diffusion", tmp_path)
    refuse_adapters(pipeline)
    peft.inject_adapter_in_model(KINDS["LoRA"](["q_proj"]), pipeline.text_encoder)
    with pytest.raises(UserError, match="text_encoder: expected no adapters"):
        refuse_adapters(pipeline)


def test_models_that_peft_has_wrapped_whole() -> None:
    pipeline = DDIMPipeline(tiny_unet(), DDIMScheduler())
    pipeline.unet = peft.get_peft_model(pipeline.unet, KINDS["LoRA"](["to_q"]))
    with pytest.raises(UserError, match="merge_and_unload"):
        refuse_adapters(pipeline)
    pipeline.unet = pipeline.unet.merge_and_unload()
    refuse_adapters(pipeline)
