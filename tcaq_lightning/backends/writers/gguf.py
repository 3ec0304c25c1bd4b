"""GGUF files, as diffusers, ComfyUI-GGUF and stable-diffusion.cpp read them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tcaq_lightning.backends.packages import require
from tcaq_lightning.backends.writers.base import WRITERS, Checkpoint, Writer, coded
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.quantizers import CodedWeight

EXTRA = "gguf"
BLOCK = 32
FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9}
"""By number format, GGUF's number of files that are mostly of it: the formats that a file holds."""
ARCHITECTURES = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "UNet2DConditionModel": "sd1",
    "QwenImageTransformer2DModel": "qwen_image",
    "WanTransformer3DModel": "wan",
    "ZImageTransformer2DModel": "lumina2",
}
"""What ComfyUI-GGUF calls denoisers; others go by their class name."""


def packed_blocks(weight: CodedWeight) -> Tensor:
    """The bytes of a weight (O, K) in one of GGUF's formats.

    A block of 32 values is its scale d in float16, in `_1` formats a minimum m in float16, in five bits a word of the
    codes' highest bits, and the rest of the codes: bytes, or in half a byte the values i and i + 16.

    Returns:
        (O, K / 32 * bytes of a block) uint8.
    """
    rows, name = weight.shape[0], weight.number_format.name
    codes = weight.codes.reshape(-1, BLOCK)
    parts = [weight.scale.reshape(-1, 1).view(torch.uint8)]
    if weight.offset is not None:
        parts.append(weight.offset.half().reshape(-1, 1).view(torch.uint8))
    if name == "q8_0":
        parts.append((codes.int() - 128).to(torch.int8).view(torch.uint8))
    else:
        if weight.bits == 5:
            high = (codes >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)
            parts.append(high.sum(2, dtype=torch.uint8))
        low = codes & 15
        parts.append(low[:, :16] | low[:, 16:] << 4)
    return torch.cat(parts, dim=1).reshape(rows, -1)


@WRITERS.register("gguf")
class GGUF(Writer):
    """Codes of linear layers in Q8_0, Q5_0, Q5_1, Q4_0, Q4_1; all other tensors in float32."""

    suffix: ClassVar[str] = ".gguf"
    consumers: ClassVar[str] = "diffusers (GGUFQuantizationConfig)"
    wanted: ClassVar[str] = f"quantization.weight.format one of {', '.join(FILE_TYPES)}, as in configs/for/sdcpp.yaml"

    def check(self) -> None:
        """The gguf package must be there."""
        require("gguf", EXTRA)

    def cannot_hold(self, layer: QuantLayer) -> str:
        """Weights of two axes in GGUF's formats, with whole blocks."""
        weight = coded(layer)
        if weight.number_format.name not in FILE_TYPES:
            return f"its number format is {weight.number_format.name}"
        if layer.spec.kind != nn.Linear.__name__:
            return "readers take codes of linear layers alone"
        inputs = math.prod(weight.shape[1:])
        return f"{inputs} inputs are no multiple of {BLOCK}" if inputs % BLOCK else ""

    def write(self, denoiser: Any, checkpoint: Checkpoint, file: Path) -> None:
        """Metadata and tensors, in the order of their names."""
        gguf = require("gguf", EXTRA)
        kind = type(denoiser).__name__
        writer = gguf.GGUFWriter(str(file), ARCHITECTURES.get(kind, kind))
        names = [weight.number_format.name for weight in checkpoint.held.values()]
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(FILE_TYPES[max(sorted(set(names)), key=names.count)])
        tensors = {name: (tensor, None) for name, tensor in checkpoint.plain.items()}
        for name, weight in checkpoint.held.items():
            kind_of_block = gguf.GGMLQuantizationType[weight.number_format.name.upper()]
            tensors[f"{name}.weight"] = packed_blocks(weight), kind_of_block
        for name, (tensor, raw) in sorted(tensors.items()):
            values = tensor if raw is not None else tensor.float()
            writer.add_tensor(name, values.contiguous().cpu().numpy(), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
