"""A frozen denoiser's tensors as a few fused ones.

Seven small tensors a layer would cost a safetensors header as long as the scales themselves. Where each tensor lies
within the fused ones follows from the keys and shapes of the denoiser's state dict, so no offsets are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.quantizers import Quantizer, StoredTensor
from tcaq_lightning.quantizers.packing import pack, packed_size, unpack


@dataclass(frozen=True)
class Stored:
    """A tensor of the denoiser and the fused tensor that holds it.

    Attributes:
        key: in the denoiser's state dict.
        how: the tensor, the fused tensor's name and type, and the code width.
    """

    key: str
    how: StoredTensor

    @property
    def size(self) -> int:
        """Elements that it takes in the fused tensor."""
        return packed_size(self.how.tensor.numel(), self.how.bits) if self.how.bits else self.how.tensor.numel()

    def encode(self) -> Tensor:
        """Its elements as they are stored; ValueError if they would not come back exactly."""
        flat = self.how.tensor.detach().cpu().reshape(-1)
        if self.how.bits:
            return pack(flat, self.how.bits)
        encoded = flat.to(self.how.dtype)
        if flat.is_floating_point() and flat.itemsize == 1:
            flat = flat.float()  # which torch cannot compare otherwise
        if not torch.equal(encoded.to(flat.dtype), flat):
            raise ValueError(f"{self.key} is NaN or not exactly {self.how.dtype}; call freeze(denoiser) before")
        return encoded

    @torch.no_grad()
    def decode(self, elements: Tensor) -> None:
        """Set the denoiser's tensor, in its own memory: kernels, and so bits, may depend on alignment."""
        flat = unpack(elements, self.how.bits, self.how.tensor.numel()) if self.how.bits else elements
        self.how.tensor.copy_(flat.reshape(self.how.tensor.shape))


def stored_tensors(denoiser: nn.Module) -> list[Stored]:
    """What is stored, in order; a shared tensor once, and of quantizers what they say.

    Blobs: `codes` (packed weights), `zero_points` (uint8), `shifts` and `bias_shifts` (float16), and the rest by dtype
    (`float32`: scales, steps, exponents, r, biases and all parameters in full precision).
    """
    tensors: dict[str, Tensor] = denoiser.state_dict(keep_vars=True)
    keys: dict[int, str] = {}
    for key, tensor in tensors.items():
        keys.setdefault(id(tensor), key)
    own: dict[str, dict[str, StoredTensor]] = {}  # of quantizers and quantized layers, by name
    stored: list[Stored] = []
    for key in sorted(keys.values()):
        module, _, attribute = key.rpartition(".")
        owner = denoiser.get_submodule(module)
        if isinstance(owner, (Quantizer, QuantLayer)):
            if module not in own:
                own[module] = {item.name: item for item in owner.stored}
            if attribute in own[module]:
                stored.append(Stored(key, own[module][attribute]))
        else:
            stored.append(Stored(key, StoredTensor.plain(attribute, tensors[key])))
    return stored


def fuse(stored: list[Stored]) -> dict[str, Tensor]:
    """The fused tensors by name, each one-dimensional.

    Raises:
        ValueError: a value that cannot be stored exactly.
    """
    parts: dict[str, list[Tensor]] = {}
    for item in stored:
        parts.setdefault(item.how.blob, []).append(item.encode())
    return {blob: torch.cat(tensors) for blob, tensors in parts.items()}


def restore(stored: list[Stored], blobs: dict[str, Tensor]) -> None:
    """Set the denoiser's tensors from the fused ones.

    Raises:
        ValueError: other names or sizes of fused tensors.
    """
    expected: dict[str, int] = {}
    for item in stored:
        expected[item.how.blob] = expected.get(item.how.blob, 0) + item.size
    found = {blob: tensor.numel() for blob, tensor in blobs.items()}
    if found != expected:
        raise ValueError(f"expected fused tensors of {expected} elements, got {found}")
    offsets = dict.fromkeys(expected, 0)
    for item in stored:
        start = offsets[item.how.blob]
        offsets[item.how.blob] = start + item.size
        item.decode(blobs[item.how.blob][start : start + item.size])
