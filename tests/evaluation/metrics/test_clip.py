from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.metrics.clip import load_clip
from tcaq_lightning.models.prompts import read_prompts
from tests.evaluation.inception_weights import pictures

transformers = pytest.importorskip("transformers")
PROMPTS = ["a b", "b", "c a b c", "a"]


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of a few thousand parameters, whose words are letters."""
    directory = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{c}</w>" for c in "abc"), *"abc"]
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**shape, **special, "vocab_size": len(words), "max_position_embeddings": 8},
        vision_config={**shape, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
        for p in model.parameters():  # biases are zero at first
            p.data += 0.3 * torch.randn_like(p)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 8},
                "crop_size": {"height": 8, "width": 8},
                "image_mean": [0.48, 0.46, 0.41],
                "image_std": [0.27, 0.26, 0.28],
            }
        )
    )
    return directory


def embeddings(clip_dir: Path, pixels: torch.Tensor, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of single images and prompts, by hand: no padding, no processor."""
    model = transformers.CLIPModel.from_pretrained(clip_dir).eval()
    vocabulary = json.loads((clip_dir / "vocab.json").read_text())
    seen, read = [], []
    for image, prompt in zip(pixels, prompts, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.BICUBIC)
        x = np.asarray(picture) / 255
        x = (x - np.array([0.48, 0.46, 0.41])) / np.array([0.27, 0.26, 0.28])
        ids = [0, *(vocabulary[f"{word}</w>"] for word in prompt.split()), 1]
        with torch.no_grad():
            vision = model.vision_model(pixel_values=torch.tensor(x).permute(2, 0, 1)[None].float()).pooler_output
            text = model.text_model(input_ids=torch.tensor([ids])).pooler_output
            seen.append(model.visual_projection(vision)[0].double().numpy())
            read.append(model.text_projection(text)[0].double().numpy())
    return np.stack(seen), np.stack(read)


def test_scores_are_cosines_of_the_right_pairs(clip_dir: Path) -> None:
    scorer, pixels = load_clip(str(clip_dir), PROMPTS), pictures(4)
    seen, read = embeddings(clip_dir, pixels, PROMPTS)
    cosines = (seen * read).sum(1) / np.linalg.norm(seen, axis=1) / np.linalg.norm(read, axis=1)
    assert (cosines > 0).any()
    expected = 100 * np.clip(cosines, 0, None)
    np.testing.assert_allclose(scorer(pixels, 0).numpy(), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(scorer(pixels[2:], 2).numpy(), expected[2:], rtol=1e-3, atol=1e-3)
    grey = pictures(2, channels=1)
    assert torch.equal(scorer(grey, 0), scorer(grey.expand(-1, 3, -1, -1), 0))


def test_agrees_with_torchmetrics(clip_dir: Path) -> None:
    from torchmetrics.multimodal import CLIPScore

    scorer, pixels = load_clip(str(clip_dir), PROMPTS), pictures(4)

    class Adapted(nn.Module):
        """transformers 5 returns objects, torchmetrics expects tensors."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model
            self.config = model.config

        def get_image_features(self, *args: Any) -> Any:
            output = self.model.get_image_features(*args)
            return output if isinstance(output, torch.Tensor) else output.pooler_output

        def get_text_features(self, *args: Any) -> Any:
            output = self.model.get_text_features(*args)
            return output if isinstance(output, torch.Tensor) else output.pooler_output

    metric = CLIPScore(lambda: (Adapted(scorer.model), scorer.processor))
    for i in range(4):
        metric.reset()
        metric.update(pixels[i], PROMPTS[i])
        assert float(scorer(pixels[i : i + 1], i)) == pytest.approx(float(metric.compute()), rel=1e-4, abs=1e-4)


def test_long_prompts_are_cut(clip_dir: Path) -> None:
    long = " ".join("abcabcabcabc")
    scores = load_clip(str(clip_dir), [long, long[:11]])(pictures(1).expand(2, -1, -1, -1), 0)
    assert float(scores[0]) == pytest.approx(float(scores[1]), rel=1e-5)


def test_a_directory_without_the_model_is_named(tmp_path: Path, clip_dir: Path) -> None:
    with pytest.raises(UserError, match=r"clip_model.*/no/such"):
        load_clip("/no/such", PROMPTS)
    with pytest.raises(UserError, match=r"clip_model.*openai"):
        load_clip("openai/clip-vit-base-patch16", PROMPTS)
    (tmp_path / "config.json").write_text((clip_dir / "config.json").read_text())
    with pytest.raises(UserError, match="clip_model") as caught:
        load_clip(str(tmp_path), PROMPTS)
    assert "\n" not in str(caught.value)


def test_prompts(tmp_path: Path) -> None:
    key = "evaluation.clip_prompts"
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(path, key) == ["a cat", "a dog"]
    for content in (b"", b" \n\n", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"clip_prompts"):
            read_prompts(path, key)
    with pytest.raises(UserError, match="nowhere"):
        read_prompts(tmp_path / "nowhere", key)
