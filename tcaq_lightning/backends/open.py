"""Open a model directory, quantized or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import DENOISER_NAMES, open_pipeline, shipped
from tcaq_lightning.runtime.json_files import read_json
from tcaq_lightning.runtime.one_line import one_line


def is_quantized(path: str) -> bool:
    """Whether a model directory holds an artifact: its denoiser's config.json has a `quantization_config`.

    Raises:
        UserError: the file is damaged.
    """
    for name in DENOISER_NAMES:
        file = (shipped(path) or Path(path)) / name / "config.json"
        if file.is_file():
            try:
                content = read_json(file)
            except ValueError as error:
                raise UserError(f"expected JSON in {file}, got {one_line(error)}; write the model again") from error
            return isinstance(content, dict) and "quantization_config" in content
    return False


def open_any(path: str, backend: str = "torch") -> Any:
    """Open an artifact, or a full-precision model, as a pipeline.

    Args:
        path: of the model, or a shipped model's name.
        backend: what runs the denoiser of an artifact.

    Raises:
        UserError: there is no such model, or it is of full precision and the backend is another than torch.
    """
    if is_quantized(path):
        return load_quantized(path, backend=backend)
    if backend != "torch":
        raise UserError(f"--backend: expected torch for a full-precision model, got {backend}; give an artifact")
    return open_pipeline(path)
