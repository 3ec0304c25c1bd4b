"""CLIP score: how well images fit their prompts (Hessel et al. 2021)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.config import EvaluationConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.metrics.base import METRICS, Given, Metric, Record, Row, decimals
from tcaq_lightning.models.prompts import read_prompts

PROMPTS_KEY = "evaluation.clip_prompts"


@METRICS.register("clip")
class ClipScore(Metric):
    """Mean CLIP score of the images and their prompts."""

    label = "CLIP score"
    settings = ("clip_model", "clip_prompts")

    def per_image(self, config: EvaluationConfig) -> ClipScorer:
        """The CLIP model with the prompt of each image."""
        assert config.clip_model is not None
        return load_clip(config.clip_model, _prompts(config))

    def check_number(self, number: int, what: str, config: EvaluationConfig, width: int) -> None:
        """There must be a prompt for each image."""
        prompts = _prompts(config)
        if len(prompts) < number:
            raise UserError(
                f"{PROMPTS_KEY}: expected a prompt for each of {number} images, got {len(prompts)} in "
                f"{config.clip_prompts}; write more, or measure fewer images"
            )

    def compute(self, given: Given) -> dict[str, Any]:
        """`mean` over the `num_samples` images, and its `std_error`."""
        scores = given.features[self.name].double()
        deviation = float(scores.std()) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        return {"mean": float(scores.mean()), "std_error": deviation, "num_samples": len(scores)}

    def row(self, record: Record) -> Row:
        """Mean and standard error."""
        figures = f"{decimals(record['mean'], 3)} ± {decimals(record['std_error'], 3)}"
        return Row(self.label, f"{figures}, {record['num_samples']} images", {self.name: record["mean"]})


def _prompts(config: EvaluationConfig) -> list[str]:
    assert config.clip_prompts is not None
    return read_prompts(Path(config.clip_prompts), PROMPTS_KEY)


class ClipScorer(nn.Module):
    """Cosine of the CLIP embeddings of images and prompts, times 100 and not below 0.

    torchmetrics' CLIPScore computes the same, but fails with transformers 5, which wraps embeddings in an object.

    Args:
        model: transformers' CLIPModel.
        processor: transformers' CLIPProcessor.
        prompts: the prompt of each image.
    """

    def __init__(self, model: nn.Module, processor: Any, prompts: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.prompts = list(prompts)
        self.prompts_hash = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()  # scores depend on them

    @torch.no_grad()
    def forward(self, pixels: Tensor, start: int) -> Tensor:
        """Scores of a batch, (B,).

        Args:
            pixels: uint8 (B, 1 or 3, H, W).
            start: number of the first image, which is the number of its prompt.
        """
        device = next(self.model.parameters()).device
        prompts = self.prompts[start : start + len(pixels)]
        images = list(pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy())
        inputs = self.processor(text=prompts, images=images, return_tensors="pt", padding=True, truncation=True)
        given = inputs.to(device)
        seen = _embedding(self.model.get_image_features(pixel_values=given["pixel_values"]))  # type: ignore[operator]
        read = _embedding(
            self.model.get_text_features(input_ids=given["input_ids"], attention_mask=given["attention_mask"])  # type: ignore[operator]
        )
        cosine = nn.functional.cosine_similarity(seen.float(), read.float())
        return 100 * cosine.clamp_min(0)


def _embedding(output: Any) -> Tensor:
    """transformers 5 returns an object, earlier versions a tensor."""
    embedding: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return embedding


def load_clip(path: str, prompts: Sequence[str]) -> ClipScorer:
    """Read CLIP from a directory; nothing is downloaded.

    Args:
        path: directory in transformers' layout, such as a copy of openai/clip-vit-large-patch14.
        prompts: the prompt of each image.

    Raises:
        UserError: transformers is not installed, or there is no CLIP model.
    """
    try:
        from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
        from transformers.models import clip
    except ImportError:
        raise UserError(
            "evaluation.metrics: clip needs transformers, which cannot be imported; "
            "pip install 'tcaq-lightning[text]', or leave clip out"
        ) from None
    # Newer versions have the one that resizes with Pillow, and so needs no torchvision, under a name of its own.
    image_processor: Any = getattr(clip, "CLIPImageProcessorPil", clip.CLIPImageProcessor)
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"evaluation.clip_model: expected a directory with a CLIP model in transformers' layout, got {path}; "
            "nothing is downloaded: give the path of a copy of openai/clip-vit-large-patch14 or another CLIP model"
        )
    try:
        model: Any = CLIPModel.from_pretrained(path, local_files_only=True)
        images = image_processor.from_pretrained(path, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
        processor: Any = CLIPProcessor(images, tokenizer)  # type: ignore[no-untyped-call]
        tokenizer.model_max_length = model.config.text_config.max_position_embeddings
    except Exception as error:  # noqa: BLE001 - transformers raises whatever a foreign file makes it stumble over
        raise UserError(
            f"evaluation.clip_model: expected a CLIP model with its processor in {path}, got "
            f"{' '.join(str(error).split())[:200]}; copy the whole directory of the model"
        ) from None
    return ClipScorer(model.float().eval().requires_grad_(False), processor, prompts)
