"""Where bfloat16 is worth computing in."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor


def autocasts(setting: bool | Literal["auto"], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of a fit are computed in bfloat16.

    Args:
        setting: `reconstruction.autocast`.
        device: that computes.
        dtype: of the model's activations. A model in a narrower type than float32 is left as it is by "auto".
    """
    if device.type == "meta":  # which knows no autocast
        return False
    return setting if isinstance(setting, bool) else dtype is torch.float32 and bfloat16_is_fast(device)


def autocast_type(x: Tensor) -> torch.dtype | None:
    """What a product would narrow `x` to now; None outside of autocast, and of a type that it leaves alone."""
    kind = x.device.type
    if kind == "meta" or x.dtype is torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16 natively: a CPU by its AMX unit, a GPU by its tensor cores."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)  # of a torch that does not tell: no
    return device.type == "cpu" and bool(capabilities().get("amx_bf16"))
