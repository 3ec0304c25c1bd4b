"""Which kernels an engine chose for the quantized products of its graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tcaq_lightning.backends.graph.onnx_graph import Product
from tcaq_lightning.errors import UserError

T = TypeVar("T")
RUN = re.compile(r" \(\d+\)$")
"""What a later run of a layer appends to its name."""
SATURATION = "16-bit sums of this processor may saturate"
NO_CONVOLUTION = "this engine has no integer convolution with float output"
ASYMMETRIC = "asymmetric weight of 8 bits: its codes do not fit int8"


@dataclass(frozen=True)
class Kernel:
    """What runs one product.

    Attributes:
        product: the product.
        kernel: as the engine calls it.
        precision: of its operands.
        integer: whether it multiplies integers.
        reason: why it was meant to run in float, or empty.
    """

    product: Product
    kernel: str
    precision: str
    integer: bool
    reason: str

    @property
    def silent(self) -> bool:
        """Whether it runs in float although it was meant to run on integers."""
        return not self.integer and not self.reason


def kernel_of(found: Mapping[str, T], name: str, missing: T) -> T:
    """The kernel of a product; of a layer's second run, that of the first one where the engine has merged the two.

    Args:
        found: kernels by the name of their product.
        name: of the product.
        missing: what stands for a kernel that is not found.
    """
    return found.get(name) or found.get(RUN.sub("", name), missing)


def described(product: Product, kernel: str, precision: str, reason: str) -> Kernel:
    """A product and its kernel.

    Args:
        product: a matrix product of the denoiser.
        kernel: name of the engine's kernel.
        precision: type that it computes in.
        reason: why it was meant to run in float, unless the product says so itself.
    """
    integer = precision in ("i8", "int8")
    return Kernel(product, kernel, precision, integer, "" if integer else product.note or reason)


def check_kernels(kernels: Sequence[Kernel], engine: str) -> None:
    """Check that nothing runs in float that was meant to run on integers.

    Raises:
        UserError: something does.
    """
    silent = [kernel for kernel in kernels if kernel.silent]
    if silent:
        first = silent[0]
        raise UserError(
            f"{engine} runs {len(silent)} of {len(kernels)} quantized products in float, such as {first.product.name} "
            f"({first.kernel} {first.precision}); expected integer kernels: use another release of {engine}, or "
            f"--allow_float true to write the file nevertheless"
        )


def table(kernels: Sequence[Kernel], engine: str) -> str:
    """One line for each product and a summary, as text."""
    width = max((len(k.product.name) for k in kernels), default=0)
    lines = []
    for k in kernels:
        weight = f"W{k.product.weight_bits}" if k.product.weight_bits else "  "
        output = f" O{k.product.output_bits}" if k.product.output_bits else ""
        bits = f"{weight} A{k.product.activation_bits}{output} {k.product.stored}"
        lines.append(f"{k.product.name:{width}}  {bits:12}  {k.precision or '-':8} {k.kernel} {k.reason}".rstrip())
    count = sum(k.integer for k in kernels)
    lines.append(f"{engine}: {count} of {len(kernels)} quantized products on integer kernels")
    return "\n".join(lines)
