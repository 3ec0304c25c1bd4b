"""Measurements that a report keeps in RUN_DIR/report, so that they need not be made again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tcaq_lightning.runtime.files import write_json
from tcaq_lightning.runtime.json_files import read_json
from tcaq_lightning.runtime.json_shape import check_shape

log = logging.getLogger(__name__)


def read_cached(path: Path, shape: Any, **key: Any) -> dict[str, Any] | None:
    """Content that `write_cached` wrote under the same key; None if it is missing, damaged, or of another key.

    Args:
        path: JSON file.
        shape: of the content, as in `check_shape`.
        key: what the measurement depends on; what is left out of it may have any value.
    """
    try:
        stored = read_json(path)
        check_shape(stored, {"key": {}, "content": shape}, path.name)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s is damaged (%s); what it holds is left out", path, error)
        return None
    if any(stored["key"].get(name) != value for name, value in key.items()):
        log.warning("%s was measured under other settings; what it holds is left out", path)
        return None
    content: dict[str, Any] = stored["content"]
    return content


def write_cached(path: Path, content: dict[str, Any], **key: Any) -> None:
    """Keep content under the key that it depends on."""
    write_json(path, {"key": key, "content": content})
