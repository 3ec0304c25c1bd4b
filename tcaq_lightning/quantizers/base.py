"""The contract of quantizers: search, quantize, learn, and say what is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Place = Literal["input", "probabilities", "output", "weight"]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a quantizer as it stands in the artifact.

    Attributes:
        name: of the quantizer's attribute, as its state dict has it.
        tensor: the quantizer's own, in its own shape.
        blob: the fused tensor of the file that holds it.
        dtype: of the file.
        bits: code width, if the tensor holds codes that are packed; else 0.
    """

    name: str
    tensor: Tensor
    blob: str
    dtype: torch.dtype
    bits: int = 0

    @classmethod
    def plain(cls, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> StoredTensor:
        """A tensor that is stored among others of a type, by default its own."""
        dtype = dtype or tensor.dtype
        return cls(name, tensor, str(dtype).removeprefix("torch."), dtype)


class Quantizer(nn.Module, ABC):
    """Maps values to those that codes stand for.

    Nobody asks of which class a quantizer is: what others have to know is said here.

    Attributes:
        kind: what it is called, in `ACTIVATION_QUANTIZERS` and where a graph form is looked up.
        is_dynamic: whether its steps are found at run time, so that nothing is searched, learned or stored of them.
        place: what it quantizes: the input of a layer or a matmul, post-softmax probabilities, the output of a layer,
            or its weight. Of inputs, ranges by channel are observed, of probabilities a histogram.
        bits: code width b.
    """

    kind: ClassVar[str] = ""
    is_dynamic: ClassVar[bool] = False
    place: ClassVar[Place] = "input"
    bits: int

    @abstractmethod
    def search(self, *args: Any, **kwargs: Any) -> Any:
        """Set what is neutral so far by what is to be quantized; each sort of quantizer has its own arguments."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The quantized values, in full precision."""

    @abstractmethod
    def begin_learning(self, *args: Any, **kwargs: Any) -> dict[str, list[nn.Parameter]]:
        """Make learnable what can be learned.

        Returns:
            The new parameters by kind: `steps`, `r`, `weight_scales`, `v`.
        """

    @abstractmethod
    def end_learning(self) -> None:
        """Fold what was learned into the buffers; does nothing if nothing is being learned."""

    @property
    @abstractmethod
    def stored(self) -> tuple[StoredTensor, ...]:
        """What the artifact holds of it; what is neutral is left out."""
