"""Safetensors files with quantized tensors as ComfyUI reads them, in the layouts of comfy-kitchen."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tcaq_lightning.backends.writers.base import WRITERS, Checkpoint, Writer, coded
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.quantizers import CodedWeight
from tcaq_lightning.runtime.registry import Registry

TILE_ROWS, TILE_COLUMNS = 128, 4
"""Scales of blocks lie in tiles of so many rows and columns."""


def tiled(scales: Tensor) -> Tensor:
    """Scales of blocks in the order of cuBLAS' tiles, padded with 0 to whole ones.

    Args:
        scales: (R, C).

    Returns:
        (R', C') with the scale (i, j) at the flat place
        ((i // 128) (C' / 4) + j // 4) 512 + (i % 32) 16 + (i % 128 // 32) 4 + j % 4.
    """
    padded = padded_to(scales, TILE_ROWS, TILE_COLUMNS)
    rows, columns = padded.shape
    parts = padded.view(rows // TILE_ROWS, 4, 32, columns // TILE_COLUMNS, TILE_COLUMNS)
    return parts.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def padded_to(values: Tensor, rows: int, columns: int) -> Tensor:
    """Values with 0 below and to the right, up to multiples of two numbers."""
    return F.pad(values, (0, -values.shape[1] % columns, 0, -values.shape[0] % rows))


class Layout(ABC):
    """How one number format stands in the file; entered into `LAYOUTS` under ComfyUI's name of it."""

    @staticmethod
    @abstractmethod
    def fits(weight: CodedWeight) -> bool:
        """Whether it holds the codes and scales of a weight (N, K)."""

    @staticmethod
    @abstractmethod
    def tensors(weight: CodedWeight) -> dict[str, Tensor]:
        """What is stored, by the end of the name: `weight`, `weight_scale`, ..."""

    @staticmethod
    def settings(weight: CodedWeight) -> dict[str, Any]:  # noqa: ARG004 - others do
        """What stands beside the layout's name in the file."""
        return {}


LAYOUTS: Registry[type[Layout]] = Registry("layout of ComfyUI")
"""By the name that stands in the file."""


@LAYOUTS.register("int8_tensorwise")
class Int8(Layout):
    """8-bit integers with a scale for each row, or for all."""

    @staticmethod
    def fits(weight: CodedWeight) -> bool:
        """Symmetric 8-bit integers by output channel or tensor."""
        kind = weight.number_format
        by_group = kind.sharing.group is not None
        return (kind.name, weight.bits) == ("int", 8) and weight.symmetric and not by_group

    @staticmethod
    def tensors(weight: CodedWeight) -> dict[str, Tensor]:
        """(N, K) int8, and (N, 1) scales."""
        codes = (weight.codes.int() - 128).to(torch.int8)
        return {"weight": codes, "weight_scale": weight.scale.expand(len(codes)).reshape(-1, 1)}


@LAYOUTS.register("awq_w4a16")
class GroupedInt4(Layout):
    """4-bit integers with a scale and a minimum for each group of inputs."""

    @staticmethod
    def fits(weight: CodedWeight) -> bool:
        """4-bit integers by groups that divide the inputs."""
        kind = weight.number_format
        group = kind.sharing.group
        return (kind.name, weight.bits) == ("int", 4) and group is not None and weight.shape[1] % group == 0

    @staticmethod
    def tensors(weight: CodedWeight) -> dict[str, Tensor]:
        """(N, K / 2) bytes with the even column low; (K / g, N) scales s and z in W = (q - 8) s + z."""
        assert weight.zero_point is not None
        codes = weight.codes
        return {
            "weight": (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8),
            "weight_scale": weight.scale.T,
            "weight_zeros": ((8 - weight.zero_point) * weight.scale).T,
        }

    @staticmethod
    def settings(weight: CodedWeight) -> dict[str, Any]:
        """Inputs of a group."""
        return {"group_size": weight.number_format.sharing.group}


class ScaledFloat8(Layout):
    """FP8 with a scale for the whole weight."""

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype]

    @classmethod
    def fits(cls, weight: CodedWeight) -> bool:
        """Of that grid, with granularity tensor."""
        return weight.number_format.name == cls.name and weight.number_format.sharing.whole

    @classmethod
    def tensors(cls, weight: CodedWeight) -> dict[str, Tensor]:
        """(N, K) of that type, and a scale without axes."""
        return {"weight": weight.codes.view(cls.dtype), "weight_scale": weight.scale.reshape(())}


@LAYOUTS.register("float8_e4m3fn")
class ScaledE4M3(ScaledFloat8):
    """Up to 448."""

    name, dtype = "e4m3", torch.float8_e4m3fn


@LAYOUTS.register("float8_e5m2")
class ScaledE5M2(ScaledFloat8):
    """Up to 57,344."""

    name, dtype = "e5m2", torch.float8_e5m2


@LAYOUTS.register("nvfp4")
class NVFP4(Layout):
    """FP4 in blocks of 16."""

    @staticmethod
    def fits(weight: CodedWeight) -> bool:
        """Any of that format."""
        return weight.number_format.name == "nvfp4"

    @staticmethod
    def tensors(weight: CodedWeight) -> dict[str, Tensor]:
        """Bytes with the even column high, both sizes padded to 16; tiled scales; the scale for all."""
        assert weight.outer is not None
        codes = padded_to(weight.codes, 16, 16)
        scales = tiled(weight.scale.view(torch.uint8)).view(torch.float8_e4m3fn)
        return {
            "weight": codes[:, ::2] << 4 | codes[:, 1::2],
            "weight_scale": scales,
            "weight_scale_2": weight.outer.reshape(()),
        }


@LAYOUTS.register("mxfp8")
class MXFP8(Layout):
    """E4M3 in blocks of 32."""

    @staticmethod
    def fits(weight: CodedWeight) -> bool:
        """Any of that format."""
        return weight.number_format.name == "mxfp8"

    @staticmethod
    def tensors(weight: CodedWeight) -> dict[str, Tensor]:
        """Numbers, both sizes padded to 32, and the exponents of their scales, tiled."""
        codes = padded_to(weight.codes, 32, 32)
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": tiled(weight.scale)}


def layout_name(weight: CodedWeight) -> str:
    """ComfyUI's name of what holds a weight; empty if nothing does."""
    return next((name for name, layout in LAYOUTS.items() if layout.fits(weight)), "")


@WRITERS.register("comfy")
class Comfy(Writer):
    """Codes of linear layers, each with its layout in a tensor `comfy_quant`; all other tensors as they are."""

    suffix: ClassVar[str] = ".safetensors"
    consumers: ClassVar[str] = "ComfyUI (comfy-kitchen)"
    wanted: ClassVar[str] = (
        "quantization.weight.format nvfp4 or mxfp8, e4m3 or e5m2 with granularity: tensor, or int with 8 bits by "
        "channel or 4 bits by group, as in configs/for/comfyui.yaml"
    )

    def check(self) -> None:
        """Nothing beyond safetensors is needed."""

    def cannot_hold(self, layer: QuantLayer) -> str:
        """Weights of linear layers for which there is a layout."""
        if layer.spec.kind != nn.Linear.__name__:
            return "ComfyUI takes codes of linear layers alone"
        weight = coded(layer)
        return "" if layout_name(weight) else f"no layout holds its number format, {layer.spec.widths.split(' A')[0]}"

    def write(self, denoiser: Any, checkpoint: Checkpoint, file: Path) -> None:
        """Tensors under their layers' names. Weights are dequantized for products, as our simulation does it."""
        tensors = dict(checkpoint.plain)
        for name, weight in checkpoint.held.items():
            kind = layout_name(weight)
            tensors |= {f"{name}.{end}": tensor for end, tensor in LAYOUTS[kind].tensors(weight).items()}
            settings = {"format": kind, "full_precision_matrix_mult": True, **LAYOUTS[kind].settings(weight)}
            tensors[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file, {"format": "pt"})
