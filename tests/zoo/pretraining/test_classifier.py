from __future__ import annotations

import json
from pathlib import Path

import torch

from tcaq_lightning.evaluation.features import REFERENCE_FILE, extract_features, load_feature_extractor
from tcaq_lightning.evaluation.metrics.fid import frechet_distance
from tcaq_lightning.evaluation.recognition import CLASSES_FILE, ClassStatistics
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tcaq_lightning.zoo.pretraining.classifier import main
from tcaq_lightning.zoo.pretraining.idx import normalize, read_split


def test_learns_and_writes_what_evaluation_reads(data: Path, tmp_path: Path) -> None:
    main(data, tmp_path, epochs=8, batch_size=16)
    assert json.loads((tmp_path / "config.json").read_text())["test_accuracy"] > 0.9
    extractor = load_feature_extractor(tmp_path)
    reference = ReferenceStatistics.load(tmp_path / REFERENCE_FILE)
    images = normalize(read_split(data, "test")[0])
    assert reference.count == len(images)
    assert frechet_distance(extract_features(extractor, images), reference).value < 1e-4
    brighter = frechet_distance(extract_features(extractor, images + 0.3), reference)
    assert brighter.value > 1e-2
    train_images, train_labels = read_split(data, "train")
    predicted = ClassStatistics.load(tmp_path / CLASSES_FILE).predict(
        extract_features(extractor, normalize(train_images))
    )
    assert (predicted == train_labels).double().mean() > 0.9


def test_same_seed_same_result(data: Path, tmp_path: Path) -> None:
    for name in "ab":
        main(data, tmp_path / name, epochs=1, batch_size=16, seed=5)
    first, second = (load_feature_extractor(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(second[key], value) for key, value in first.items())
