"""Hashes of a pipeline's components: what is the same gives the same, wherever it was opened from."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from tcaq_lightning.models.pipelines import public_config
from tcaq_lightning.runtime.hashing import add_weights, path_hash

NAMES_OF_PLACES = ("name_or_path", "_name_or_path", "transformers_version", "_diffusers_version")
"""Settings that say where a component was opened from and by which version, not what it is."""

UNUSED = "safety_checker"
"""Component that sampling leaves out."""


def pipeline_hashes(pipeline: Any) -> dict[str, str]:
    """Hash of every component of a pipeline by name, and of the pipeline's class as `pipeline`.

    Weights count with their names, types and shapes, in memory as they are now; how files divide them does not. Of
    tokenizers and image processors it is what they would save.

    Args:
        pipeline: any pipeline of diffusers.

    Returns:
        20 hexadecimal digits of SHA-256 each; components that are None are left out.
    """
    found = {"pipeline": _digest([type(pipeline).__name__])}
    for name, part in sorted(pipeline.components.items()):
        if part is not None and name != UNUSED:
            found[name] = component_hash(part)
    return found


def component_hash(component: Any) -> str:
    """20 hexadecimal digits of a SHA-256 over a component's class, settings and weights."""
    kind = type(component).__name__
    if isinstance(component, nn.Module):
        digest = hashlib.sha256(_plain([kind, _settings(component)]))
        add_weights(digest, component)
        return digest.hexdigest()[:20]
    if hasattr(component, "config"):
        return _digest([kind, _settings(component)])
    if hasattr(component, "save_pretrained"):
        return _digest([kind, _saved(component)])
    plain = isinstance(component, (bool, int, float, str, list, tuple, dict))
    return _digest([kind, component] if plain else [kind])  # of other objects nothing but the class is known


def _settings(component: Any) -> dict[str, Any]:
    """A component's own settings; those of transformers are objects that give dictionaries."""
    config = getattr(component, "config", None)
    if config is None:
        return {}
    values = config.to_dict() if hasattr(config, "to_dict") else public_config(component)
    return {key: value for key, value in values.items() if key not in NAMES_OF_PLACES}


def _saved(component: Any) -> dict[str, Any]:
    """What a component would save: JSON by its values, other files by their hashes."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        component.save_pretrained(directory)
        for path in sorted(p for p in Path(directory).rglob("*") if p.is_file()):
            name = path.relative_to(directory).as_posix()
            values = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else path_hash(path)
            if isinstance(values, dict):
                values = {key: value for key, value in values.items() if key not in NAMES_OF_PLACES}
            found[name] = values
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(_plain(value)).hexdigest()[:20]


def _plain(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
