"""Training of the classifier whose features FID uses, and the statistics of the real images' features.

    python -m tcaq_lightning.zoo.pretraining.classifier --data /usr/share/datasets/fashion-mnist --output DIRECTORY

`DIRECTORY` then holds config.json, model.safetensors, reference.safetensors (all test images) and classes.safetensors
(the training images by class), as evaluation reads them.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tcaq_lightning.evaluation.features import (
    REFERENCE_FILE,
    FeatureExtractor,
    extract_features,
    save_feature_extractor,
)
from tcaq_lightning.evaluation.recognition import CLASSES_FILE, ClassStatistics
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tcaq_lightning.zoo.pretraining.batches import batch_indices
from tcaq_lightning.zoo.pretraining.command import run
from tcaq_lightning.zoo.pretraining.idx import normalize, read_split

_log = logging.getLogger(__name__)


class ClassifierPretraining(pl.LightningModule):
    """Cross-entropy on the labels, with a linear head over the rectified features.

    Args:
        images: uint8 (N, H, W).
        labels: int64 (N,).
        steps: optimizer steps in all.
        batch_size: images a step.
        lr: peak of the one-cycle schedule.
        seed: of the order of the images.
    """

    def __init__(self, images: Tensor, labels: Tensor, steps: int, batch_size: int, lr: float, seed: int) -> None:
        super().__init__()
        self.extractor = FeatureExtractor()
        self.head = nn.Linear(self.extractor.num_features, int(labels.max()) + 1)
        self.images, self.labels = images, labels
        self.steps, self.batch_size, self.lr, self.seed = steps, batch_size, lr, seed

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 1, H, W) in [-1, 1]."""
        logits: Tensor = self.head(F.relu(self.extractor(images)))
        return logits

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """Loss of the step's images."""
        index = batch_indices(len(self.images), self.batch_size, self.global_step, self.seed)
        images, labels = normalize(self.images[index]).to(self.device), self.labels[index].to(self.device)
        loss = F.cross_entropy(self(images), labels, label_smoothing=0.05)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle learning rate (Smith and Topin 2018)."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.steps + 1, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of images (N, 1, H, W) whose largest logit is that of their label.

    Args:
        model: the classifier.
        images: (N, 1, H, W).
        labels: (N,).
    """
    return float((extract_features(model, images).argmax(dim=1) == labels).double().mean())


def main(
    data: Path,
    output: Path,
    epochs: int = 8,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Train the feature extractor and write it with the statistics of the test images.

    Args:
        data: directory of the IDX files, such as /usr/share/datasets/fashion-mnist.
        output: directory to write to.
        epochs: passes over the training images.
        batch_size: images a step.
        lr: peak learning rate.
        seed: of the weights and of the order of the images.
        threads: CPU threads; without it, PyTorch's own number.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    images, labels = read_split(data, "train")
    test_images, test_labels = read_split(data, "test")
    steps = max(1, epochs * len(images) // batch_size)
    torch.manual_seed(seed)
    module = ClassifierPretraining(images, labels, steps, batch_size, lr, seed)
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
    loader: DataLoader[int] = DataLoader(range(steps), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)

    module = module.cpu().eval()
    real = normalize(test_images)
    test_accuracy = accuracy(module, real, test_labels)
    facts = {"data": "Fashion-MNIST", "seed": seed, "epochs": epochs, "test_accuracy": round(test_accuracy, 4)}
    save_feature_extractor(module.extractor, output, facts)
    ReferenceStatistics.from_features(extract_features(module.extractor, real)).save(output / REFERENCE_FILE)
    train_features = extract_features(module.extractor, normalize(images))
    ClassStatistics.from_features(train_features, labels).save(output / CLASSES_FILE)
    _log.info("test accuracy %.4f; written to %s", test_accuracy, output)


if __name__ == "__main__":
    run(main)
