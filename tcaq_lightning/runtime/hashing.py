"""Names for a model's weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


def weights_hash(module: nn.Module, digits: int = 20) -> str:
    """So many hexadecimal digits of a SHA-256 over a module's parameters and buffers and their names."""
    digest = hashlib.sha256()
    add_weights(digest, module)
    return digest.hexdigest()[:digits]


def add_weights(digest: Any, module: nn.Module) -> None:
    """Add a module's parameters and buffers, with their names, to a digest of hashlib."""
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
