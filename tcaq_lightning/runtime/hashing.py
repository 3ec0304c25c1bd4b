"""Hashes of weights and of files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.runtime.files import sha256


def weights_hash(module: nn.Module, digits: int = 20) -> str:
    """So many hexadecimal digits of a SHA-256 over a module's parameters and buffers and their names."""
    digest = hashlib.sha256()
    add_weights(digest, module)
    return digest.hexdigest()[:digits]


def add_weights(digest: Any, module: nn.Module) -> None:
    """Add a module's parameters and buffers, with their names, to a digest of hashlib."""
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} ".encode())
        _add_tensor(digest, tensor)


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def values_hash(values: Sequence[Any], digits: int = 20) -> str:
    """So many hexadecimal digits of a SHA-256 over tensors, numbers and texts in their order."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            _add_tensor(digest, value)
        else:
            digest.update(f"{type(value).__name__} {value!r}\n".encode())
    return digest.hexdigest()[:digits]


def path_hash(path: Path, digits: int = 20) -> str:
    """So many hexadecimal digits of a SHA-256 over a file, or over a directory's files with their names.

    Args:
        path: of a file or directory that exists.
        digits: at most 64.
    """
    if path.is_file():
        return sha256(path)[:digits]
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()[:digits]
