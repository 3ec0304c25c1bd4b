"""Which kernels an engine chose for the quantized products, from its own graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tcaq_lightning.backends.graph.onnx_graph import Product
from tcaq_lightning.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto

T = TypeVar("T")
RUN = re.compile(r" \(\d+\)$")
"""What a later run of a layer appends to its name."""
MOVED = re.compile(r"_token_\d+$")
"""What ONNX Runtime appends to the name of a node that it rewrote for another layout."""
LOWERED = "/DequantizationMultiply"
"""What OpenVINO appends to the name of a layer whose scale it moved behind it."""
INTEGER_OPERATORS = frozenset(
    {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm"}
)
"""Of ONNX Runtime's optimised graph."""

SATURATION = "16-bit sums of this processor may saturate"
NO_CONVOLUTION = "this engine has no integer convolution with float output"


@dataclass(frozen=True)
class Kernel:
    """What runs one product.

    Attributes:
        product: the product. kernel: as the engine calls it. precision: of its operands.
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


def openvino_kernels(compiled: Any, products: Sequence[Product], in_float: Iterable[str] = ()) -> list[Kernel]:
    """Kernels of a compiled OpenVINO model, from its runtime model.

    Args:
        compiled: `openvino.CompiledModel`.
        products: of the graph.
        in_float: names of those that were kept off integer kernels.
    """
    found: dict[str, tuple[str, str]] = {}
    for op in compiled.get_runtime_model().get_ops():
        info = {key: value.astype(str) for key, value in op.get_rt_info().items() if hasattr(value, "astype")}
        if info.get("layerType") in ("Convolution", "GroupConvolution", "MatMul", "FullyConnected", "Deconvolution"):
            for name in info.get("originalLayersNames", "").split(","):
                kernel = f"{info['layerType']} {info.get('primitiveType', '')}"
                # `runtimePrecision` alone also is i8 for float kernels whose weights are stored so
                precision = kernel.rpartition("_")[2].lower()
                found.setdefault(name.removesuffix(LOWERED), (kernel, precision))
    kept = set(in_float)
    missing = ("not found", "")
    return [_kernel(p, *_of(found, p.name, missing), SATURATION if p.name in kept else "") for p in products]


def onnxruntime_kernels(optimised: ModelProto, products: Sequence[Product], in_float: bool = False) -> list[Kernel]:
    """Kernels of an ONNX Runtime session, from the graph that it optimised and wrote.

    Its integer convolution gives integers: one whose output stays in float runs in float.

    Args:
        optimised: the graph.
        products: of the graph.
        in_float: whether all were kept off integer kernels.
    """
    found = {MOVED.sub("", node.name): node.op_type for node in optimised.graph.node}
    kernels = []
    for product in products:
        operator = _of(found, product.name, "not found")
        precision = "int8" if operator in INTEGER_OPERATORS else "float32"
        needs_float = product.operator == "Conv" and product.output_bits is None
        reason = SATURATION if in_float else NO_CONVOLUTION if needs_float else ""
        kernels.append(_kernel(product, operator, precision, reason))
    return kernels


def _of(found: Mapping[str, T], name: str, missing: T) -> T:
    """The kernel of a product; of a layer's second run, that of the first one where the engine has merged the two."""
    return found.get(name) or found.get(RUN.sub("", name), missing)


def _kernel(product: Product, kernel: str, precision: str, reason: str) -> Kernel:
    integer = precision in ("i8", "int8")
    return Kernel(product, kernel, precision, integer, "" if integer else product.note or reason)


def check_kernels(kernels: Sequence[Kernel], engine: str) -> None:
    """See that nothing runs in float that was meant to run on integers.

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
