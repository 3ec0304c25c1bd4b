"""What generated images are compared with: real images, or statistics of their features."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.arrays import ARCHIVE_ERRORS, read_numbers
from tcaq_lightning.evaluation.images import IMAGES_ARRAY, ImageSet, open_images
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics, check_gaussian
from tcaq_lightning.runtime.files import replacing

KEY = "evaluation.reference"
PARTS = {
    "statistics": "mean",
    "spatial": "spatial statistics",
    "features": "features",
}
"""Parts of a reference that a metric may compare with, and what messages call them."""
ARRAYS = {"statistics": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Names of mean and covariance in an .npz of the guided-diffusion evaluations."""


@dataclass(frozen=True)
class Reference:
    """Features of real images, as far as they are known.

    Attributes:
        statistics: mean and covariance of pooled features.
        spatial: mean and covariance of spatial features.
        features: (N, F) the pooled features themselves.
        images: what the missing parts can be computed from.
    """

    statistics: ReferenceStatistics | None = None
    spatial: ReferenceStatistics | None = None
    features: Tensor | None = None
    images: ImageSet | None = None

    def missing(self, parts: Iterable[str]) -> list[str]:
        """Those of the given parts that are missing, sorted."""
        return sorted(part for part in set(parts) if getattr(self, part) is None)

    def completed(self, measured: Mapping[str, Tensor]) -> Reference:
        """With what is missing taken from features of `images`; statistics that came with them stay.

        Args:
            measured: `pooled` (N, F) and `spatial` (N, F'), or one of them.
        """
        statistics, spatial = self.statistics, self.spatial
        if statistics is None and "pooled" in measured:
            statistics = ReferenceStatistics.from_features(measured["pooled"])
        if spatial is None and "spatial" in measured:
            spatial = ReferenceStatistics.from_features(measured["spatial"])
        return Reference(statistics, spatial, measured.get("pooled"))

    def save(self, path: Path, num_features: int, extractor: str, checksum: str) -> None:
        """Write statistics, and some features beside them, as safetensors.

        Args:
            path: the file, written atomically.
            num_features: how many images' features to keep, evenly spaced over the images.
            extractor: its name, for messages.
            checksum: of its weights.
        """
        assert self.statistics is not None
        tensors = {
            "mean": self.statistics.mean,
            "covariance": self.statistics.covariance,
            "count": torch.tensor(self.statistics.count or 0),
        }
        if self.spatial is not None:
            tensors |= {"spatial_mean": self.spatial.mean, "spatial_covariance": self.spatial.covariance}
        if self.features is not None and num_features:
            kept = min(num_features, len(self.features))
            tensors["features"] = self.features[torch.arange(kept) * len(self.features) // kept]
        with replacing(path) as temporary:
            metadata = {"extractor": extractor, "checksum": checksum}
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)


def open_reference(path: Path, needed: Mapping[str, Collection[str]], num_features: int, checksum: str) -> Reference:
    """Find out what a reference offers, and check that it is enough for the metrics.

    Args:
        path: folder of images; .npz with images `arr_0`, or `mu`, `sigma`, `mu_s` and `sigma_s`, or both; .safetensors
            that `python -m tcaq_lightning statistics` wrote.
        needed: by metric, the parts that it compares with.
        num_features: F of the extractor.
        checksum: of the extractor's weights.

    Raises:
        UserError: it is none of these, was made with another extractor, or lacks what a metric needs.
    """
    parts = {part for of_metric in needed.values() for part in of_metric}
    if path.suffix == ".safetensors":
        reference = _open_statistics(path, checksum)
    elif path.suffix == ".npz" and path.is_file():
        reference = _open_npz(path, parts)
    else:
        reference = Reference(images=open_images(path, KEY))
    if reference.statistics is not None and len(reference.statistics.mean) != num_features:
        raise UserError(
            f"{KEY}: expected statistics of {num_features} features, as evaluation.features gives them, "
            f"got {len(reference.statistics.mean)} in {path}; take both from the same extractor"
        )
    missing = reference.missing(parts)
    if missing and reference.images is None:
        lacking = [metric for metric, of_metric in needed.items() if set(of_metric) & set(missing)]
        raise UserError(
            f"{KEY}: {', '.join(lacking)} cannot be measured against {path}, which holds no "
            f"{' and no '.join(PARTS[part] for part in missing)}; "
            "give a folder or an .npz of images, or write the statistics with python -m tcaq_lightning statistics"
        )
    return reference


def _open_statistics(path: Path, checksum: str) -> Reference:
    statistics = ReferenceStatistics.load(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys() if name not in {"mean", "covariance"}}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{KEY}: expected statistics in {path}, got {error}; write them again") from None
    if metadata.get("checksum", checksum) != checksum:
        raise UserError(
            f"{KEY}: expected statistics of the extractor with checksum {checksum}, got those of "
            f"{metadata.get('extractor')} with {metadata['checksum']} in {path}; write them again with "
            "python -m tcaq_lightning statistics and the weights that are used here"
        )
    spatial = None
    if "spatial_mean" in found:
        if "spatial_covariance" not in found:
            raise UserError(
                f"{KEY}: expected spatial_covariance beside spatial_mean in {path}, got none; write it again"
            )
        mean, covariance = found["spatial_mean"].double(), found["spatial_covariance"].double()
        check_gaussian(mean, covariance, str(path))
        spatial = ReferenceStatistics(mean, covariance, statistics.count)
    features = found.get("features")
    if features is not None:
        shape = (len(features) if features.ndim else 0, len(statistics.mean))
        if features.shape != shape or not features.is_floating_point() or not features.isfinite().all():
            raise UserError(
                f"{KEY}: expected finite features (N, {shape[1]}) in {path}, got {features.dtype} "
                f"{tuple(features.shape)}; write the statistics again"
            )
    return Reference(statistics, spatial, features)


def _open_npz(path: Path, needed: Collection[str]) -> Reference:
    """Statistics, images, or both: then the statistics are those of FID and sFID, as in the published evaluations."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            parts: dict[str, Any] = {}
            for part, arrays in ARRAYS.items():
                if set(arrays) <= names:
                    parts[part] = _statistics(path, *(read_numbers(archive, f"{name}.npy") for name in arrays))
    except ARCHIVE_ERRORS as error:
        raise UserError(
            f"{KEY}: expected an .npz in {path}, got {' '.join(str(error).split())[:200]}; download or write it again"
        ) from None
    if IMAGES_ARRAY not in names:
        if not parts:
            raise UserError(
                f"{KEY}: expected `{IMAGES_ARRAY}` (uint8 images) or `mu` and `sigma` in {path}, "
                f"got {json.dumps(sorted(names)[:10])}; give such an .npz or a folder of images"
            )
        return Reference(**parts)
    reference = Reference(**parts)
    return Reference(**parts, images=open_images(path, KEY) if reference.missing(needed) else None)


def _statistics(path: Path, mean: Any, covariance: Any) -> ReferenceStatistics:
    m, c = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    check_gaussian(m, c, f"{path} ({KEY})")
    return ReferenceStatistics(m, c, None)
