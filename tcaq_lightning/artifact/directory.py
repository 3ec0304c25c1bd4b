"""The quantized model on disk: a diffusers directory whose denoiser holds packed integers.

model_index.json, scheduler/, ...                   as diffusers writes them
DENOISER/config.json                                the denoiser's config with a `quantization_config`
DENOISER/diffusion_pytorch_model.safetensors        a few fused tensors, see `fused`
checksums.json                                      SHA-256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from tcaq_lightning.artifact.blobs import fuse, restore, stored_tensors
from tcaq_lightning.artifact.bounded import check_size
from tcaq_lightning.artifact.diffusers_quantizer import (
    CHECKSUMS_FILE,
    PLAIN,
    QUANT_METHOD,
    QUANTIZED_OUTPUTS,
    TCAQConfig,
    TCAQQuantizer,
    check_format,
    checksums_text,
    config_text,
    finish,
    write_checksums,
)
from tcaq_lightning.artifact.freeze import freeze
from tcaq_lightning.artifact.structure import Structure, describe, dtype_of, rebuild
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import denoiser_name, pipeline_class, quiet_diffusers
from tcaq_lightning.models.unets import denoiser_class, found_in
from tcaq_lightning.runtime.files import naming, sha256
from tcaq_lightning.runtime.json_files import read_json
from tcaq_lightning.runtime.one_line import one_line
from tcaq_lightning.runtime.version import VERSION

__all__ = [
    "CHECKSUMS_FILE",
    "artifact_sizes",
    "freeze",
    "open_artifact",
    "save_artifact",
    "weights_digest",
    "write_checksums",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = "model_index.json"
LARGEST_PACKING = 8
"""Weights in a byte, at most."""


def save_artifact(
    pipeline: DiffusionPipeline,
    denoiser_name: str,
    denoiser: nn.Module,
    directory: str | Path,
    metadata: dict[str, Any],
) -> None:
    """Write a frozen denoiser and the rest of its pipeline as a directory that appears whole or not at all.

    Args:
        pipeline: gives model_index.json and all components but the denoiser.
        denoiser_name: component name of the denoiser, such as `unet`.
        denoiser: quantized and frozen.
        directory: where to; an artifact that is already there is replaced.
        metadata: further JSON values for `quantization_config`.

    Raises:
        UserError: `directory` holds something else than an artifact.
        ValueError: the denoiser is not frozen, or holds NaN.
    """
    target = Path(directory).resolve()
    listed = any((folder / CHECKSUMS_FILE).is_file() for folder in (target, target / denoiser_name))
    if target.exists() and not listed and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{directory} exists and is not an artifact; give another directory or remove it")
    incoming, outgoing = (target.with_name(f".{target.name}.{state}") for state in ("incoming", "outgoing"))
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        with naming(target):
            incoming.mkdir(parents=True)
            _write_components(pipeline, denoiser_name, incoming)
            _write_denoiser(denoiser, incoming / denoiser_name, metadata, _component_dtypes(pipeline, denoiser_name))
            write_checksums(incoming)
        shutil.rmtree(outgoing, ignore_errors=True)
        if target.exists():
            target.rename(outgoing)
        incoming.rename(target)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    shutil.rmtree(outgoing, ignore_errors=True)


def _write_components(pipeline: Any, denoiser_name: str, directory: Path) -> None:
    index = json.loads(pipeline.to_json_string())
    index.pop("_name_or_path", None)  # where the model lay on this machine
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, component in pipeline.components.items():
        if name != denoiser_name and hasattr(component, "save_pretrained"):
            component.save_pretrained(directory / name)
        if isinstance(component, SchedulerMixin):
            _omit_defaults(component, directory / name / SCHEDULER_CONFIG_NAME)


def _component_dtypes(pipeline: Any, denoiser_name: str) -> dict[str, str]:
    """Types of the other networks where they are not float32: diffusers' files do not say."""
    found = {name: getattr(part, "dtype", None) for name, part in pipeline.components.items() if name != denoiser_name}
    return {
        name: str(dtype).removeprefix("torch.")
        for name, dtype in found.items()
        if isinstance(dtype, torch.dtype) and dtype is not torch.float32
    }


def _omit_defaults(scheduler: Any, file: Path) -> None:
    """Take settings that nobody chose out of a saved scheduler's config.

    diffusers writes them as if they were chosen, and a scheduler of another class that is made from the saved one would
    then take them over instead of its own defaults, unlike one that is made from the original.
    """
    unset = scheduler.config.get("_use_default_values", [])
    config = {key: value for key, value in _read_json(file).items() if key not in unset}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_denoiser(denoiser: Any, folder: Path, metadata: dict[str, Any], dtypes: dict[str, str]) -> None:
    structure = describe(denoiser)
    weights = save(fuse(stored_tensors(denoiser)), metadata={"format": "pt"})
    quantization = {
        "quant_method": QUANT_METHOD,
        "version": QUANTIZED_OUTPUTS if any(e.quantized_output for e in structure.layers.values()) else PLAIN,
        "tcaq_lightning": VERSION,
        **structure.to_dict(),
        **({"component_dtypes": dtypes} if dtypes else {}),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "metadata": metadata,
    }
    folder.mkdir()
    (folder / WEIGHTS_FILE).write_bytes(weights)
    (folder / CONFIG_FILE).write_text(config_text(denoiser, quantization), encoding="utf-8")


@dataclass
class OpenedArtifact:
    """An artifact as it was opened.

    Attributes:
        pipeline: with the integer denoiser in its place.
        denoiser_name: component name of the denoiser, such as `unet`.
        denoiser: without gradients and in evaluation mode.
        digest: SHA-256 of the denoiser's weights.
        directory: where it lies.
    """

    pipeline: DiffusionPipeline
    denoiser_name: str
    denoiser: nn.Module
    digest: str
    directory: Path


def open_artifact(path: str | Path, device: torch.device | str | None = None, packed: bool = True) -> OpenedArtifact:
    """Open an artifact as an ordinary diffusers pipeline whose denoiser simulates integers.

    It computes the same bits as the denoiser that was saved. Nothing is unpickled and no network is used.

    Args:
        path: the artifact's directory, such as RUN_DIR/quantized.
        device: where to put it; the CPU by default.
        packed: keep weights packed in memory as they are on disk; each layer unpacks its own when it runs.

    Raises:
        UserError: no artifact there, another format version, a missing or damaged file.
    """
    directory = Path(path)
    name, config, quantization = _read_config(directory)
    _verify_checksums(directory, name)
    denoiser = _build(directory / name, config, quantization, packed)
    index = _read_json(directory / INDEX_FILE)
    quiet_diffusers(index)
    opener = pipeline_class(index)
    loading: dict[str, Any] = {name: denoiser}
    try:
        if dtypes := quantization.get("component_dtypes"):
            loading["torch_dtype"] = {part: dtype_of(dtype) for part, dtype in dtypes.items()}
        with found_in(index[name][0], denoiser):
            pipeline = opener.from_pretrained(
                str(directory), use_safetensors=True, low_cpu_mem_usage=False, local_files_only=True, **loading
            )
    except Exception as error:  # whatever diffusers' loaders raise is about these files
        raise UserError(f"{directory}: cannot open the pipeline: {one_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    loaded: DiffusionPipeline = pipeline if device is None else pipeline.to(device)
    return OpenedArtifact(loaded, name, denoiser, str(quantization.get("sha256")), directory.resolve())


def weights_digest(directory: str | Path) -> str:
    """SHA-256 of an artifact's weights, as its config states it."""
    _, _, quantization = _read_config(Path(directory))
    return str(quantization.get("sha256"))


def artifact_sizes(directory: str | Path) -> int:
    """Bytes on disk of the denoiser's files, of an artifact or of a full-precision model in diffusers layout."""
    root = Path(directory)
    folder = root / _denoiser_name(root)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _read_config(directory: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name and config of the denoiser, and the quantization_config taken out of it."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected an artifact such as RUN_DIR/quantized")
    name = _denoiser_name(directory)
    file = directory / name / CONFIG_FILE
    config = _read_json(file)
    quantization = config.pop("quantization_config", None)
    if not isinstance(quantization, dict):
        raise UserError(f"{file} has no quantization_config; expected a quantized artifact, got a full-precision model")
    check_format(quantization, str(file))
    return name, config, quantization


def _denoiser_name(directory: Path) -> str:
    file = directory / INDEX_FILE
    return denoiser_name(_read_json(file), str(file))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except OSError as error:
        raise UserError(f"{file} is missing or unreadable; expected a file of a diffusers directory") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: expected JSON, got {one_line(error)}; copy or write it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: expected a JSON object, got {type(values).__name__}")
    return values


def _verify_checksums(directory: Path, name: str) -> None:
    """Check that the files are as they were written; `save_pretrained` lists those of the denoiser alone."""
    if not (directory / CHECKSUMS_FILE).is_file() and (directory / name / CHECKSUMS_FILE).is_file():
        directory = directory / name
    own = directory / CHECKSUMS_FILE
    files = _read_json(own).get("files")
    if not isinstance(files, dict) or own.read_bytes() != checksums_text(files).encode():
        raise UserError(f"{own} is damaged: expected a list of checksums that fits its own; copy or write it again")
    for name, expected in files.items():
        file = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{own} is damaged: expected names of files beneath it, got {name!r}")
        if not file.is_file():
            raise UserError(f"{file} is missing; {CHECKSUMS_FILE} lists it; copy or write the artifact again")
        if (got := sha256(file)) != expected:
            raise UserError(
                f"{file} is damaged: expected SHA-256 {expected} ({CHECKSUMS_FILE}), got {got}; "
                f"copy or write the artifact again"
            )


def artifact_digest(directory: Path) -> str:
    """SHA-256 of an artifact, by its list of checksums.

    Raises:
        UserError: there is no artifact.
    """
    lists = [directory / CHECKSUMS_FILE, *sorted(directory.glob(f"*/{CHECKSUMS_FILE}"))]  # or its denoiser's alone
    found = next((file for file in lists if file.is_file()), None)
    if found is None:
        raise UserError(f"{lists[0]} is missing: expected the artifact of the run; repeat the run in another run_dir")
    return hashlib.sha256(found.read_bytes()).hexdigest()


def _build(folder: Path, config: dict[str, Any], quantization: dict[str, Any], packed: bool) -> nn.Module:
    """The frozen denoiser: its architecture from the config, its tensors from the safetensors file."""
    file = folder / CONFIG_FILE
    class_name = str(config.get("_class_name"))
    known = denoiser_class(class_name, str(file))
    weights = folder / WEIGHTS_FILE
    try:
        structure = Structure.from_dict(quantization)
        size = weights.stat().st_size if weights.is_file() else 0
        check_size(known, config, len(structure.layers) + len(structure.attentions), size * LARGEST_PACKING)
        with torch.random.fork_rng(devices=[]):  # the random weights are thrown away
            denoiser: nn.Module = known.from_config(config)
        rebuild(denoiser, structure, packed)
    except Exception as error:  # diffusers' configs and the tables raise each in its own way
        raise UserError(f"{file}: its tables do not fit a {class_name}: {one_line(error)}") from error
    try:
        restore(stored_tensors(denoiser), load_file(weights))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{weights} does not fit {file}: {one_line(error)}; write the artifact again") from error
    finish(denoiser, TCAQQuantizer(TCAQConfig(**quantization)))
    return denoiser.requires_grad_(False).eval()
