"""A frozen denoiser's tensors as a few fused ones.

Seven small tensors a layer would cost a safetensors header as long as the scales themselves. Where each tensor lies
within the fused ones follows from the keys and shapes of the denoiser's state dict, so no offsets are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tcaq_lightning.artifact.freeze import LayerEntry
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.quantizers import ActivationQuantizer, IntegerWeight, PackedWeight, TokenQuantizer
from tcaq_lightning.quantizers.packing import pack, packed_size, unpack


@dataclass(frozen=True)
class Stored:
    """A tensor of the denoiser and the fused tensor that holds it.

    Attributes:
        key: in the denoiser's state dict.
        tensor: the denoiser's own.
        blob: name of the fused tensor.
        dtype: of the fused tensor.
        bits: code width if packed, else 0.
    """

    key: str
    tensor: Tensor
    blob: str
    dtype: torch.dtype
    bits: int = 0

    @property
    def size(self) -> int:
        """Elements that it takes in the fused tensor."""
        return packed_size(self.tensor.numel(), self.bits) if self.bits else self.tensor.numel()

    def encode(self) -> Tensor:
        """Its elements as they are stored; ValueError if they would not come back exactly."""
        flat = self.tensor.detach().cpu().reshape(-1)
        if self.bits:
            return pack(flat, self.bits)
        encoded = flat.to(self.dtype)
        if not torch.equal(encoded.to(flat.dtype), flat):
            raise ValueError(f"{self.key} is NaN or not exactly {self.dtype}; call freeze(denoiser) before")
        return encoded

    @torch.no_grad()
    def decode(self, elements: Tensor) -> None:
        """Set the denoiser's tensor, in its own memory: kernels, and so bits, may depend on alignment."""
        flat = unpack(elements, self.bits, self.tensor.numel()) if self.bits else elements
        self.tensor.copy_(flat.reshape(self.tensor.shape))


def stored_tensors(denoiser: nn.Module, layers: dict[str, LayerEntry]) -> list[Stored]:
    """What is stored, in order; a shared tensor once, and nothing that the table says is neutral.

    Blobs: `codes` (packed weights), `zero_points` (uint8), `shifts` and `bias_shifts` (float16), and the rest by dtype
    (`float32`: scales, steps, exponents, r, biases and all parameters in full precision).
    """
    symmetric = {f"{name}.weight_quantizer.zero_point" for name, entry in layers.items() if entry.symmetric}
    reparameterized = {f"{name}.input_quantizer.r" for name, entry in layers.items() if entry.reparameterized}
    tensors: dict[str, Tensor] = denoiser.state_dict(keep_vars=True)
    keys: dict[int, str] = {}
    for key, tensor in tensors.items():
        keys.setdefault(id(tensor), key)
    stored: list[Stored] = []
    for key in sorted(keys.values()):
        module, _, attribute = key.rpartition(".")
        owner, tensor = denoiser.get_submodule(module), tensors[key]
        if isinstance(owner, ActivationQuantizer) and attribute == "r" and key not in reparameterized:
            continue
        if isinstance(owner, TokenQuantizer) and attribute in ("delta", "zero_point"):  # found at run time
            continue
        if key in symmetric:
            continue
        if isinstance(owner, IntegerWeight) and attribute == "codes":
            stored.append(Stored(key, tensor, "codes", torch.uint8, owner.bits))
        elif isinstance(owner, PackedWeight) and attribute == "packed":
            stored.append(Stored(key, tensor, "codes", torch.uint8))
        elif isinstance(owner, IntegerWeight) and attribute == "tensor":  # of torchao
            stored.append(Stored(key, owner.codes, "codes", torch.uint8, owner.bits))
        elif isinstance(owner, (IntegerWeight, ActivationQuantizer)) and attribute == "zero_point":
            stored.append(Stored(key, tensor, "zero_points", torch.uint8))
        elif isinstance(owner, ActivationQuantizer) and attribute == "shift":
            stored.append(Stored(key, tensor, "shifts", torch.float16))
        elif isinstance(owner, QuantLayer) and attribute == "bias_shift":
            stored.append(Stored(key, tensor, "bias_shifts", torch.float16))
        else:
            stored.append(Stored(key, tensor, str(tensor.dtype).removeprefix("torch."), tensor.dtype))
    return stored


def fuse(stored: list[Stored]) -> dict[str, Tensor]:
    """The fused tensors by name, each one-dimensional.

    Raises:
        ValueError: a value that cannot be stored exactly.
    """
    parts: dict[str, list[Tensor]] = {}
    for item in stored:
        parts.setdefault(item.blob, []).append(item.encode())
    return {blob: torch.cat(tensors) for blob, tensors in parts.items()}


def restore(stored: list[Stored], blobs: dict[str, Tensor]) -> None:
    """Set the denoiser's tensors from the fused ones.

    Raises:
        ValueError: other names or sizes of fused tensors.
    """
    expected: dict[str, int] = {}
    for item in stored:
        expected[item.blob] = expected.get(item.blob, 0) + item.size
    found = {blob: tensor.numel() for blob, tensor in blobs.items()}
    if found != expected:
        raise ValueError(f"expected fused tensors of {expected} elements, got {found}")
    offsets = dict.fromkeys(expected, 0)
    for item in stored:
        start = offsets[item.blob]
        offsets[item.blob] = start + item.size
        item.decode(blobs[item.blob][start : start + item.size])
