"""ONNX Runtime: integer kernels on an ONNX graph."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcaq_lightning.backends.base import BACKENDS
from tcaq_lightning.backends.engines import Engine, EngineBackend
from tcaq_lightning.backends.graph.onnx_graph import METADATA_KEY, Product
from tcaq_lightning.backends.graph_info import GraphInfo
from tcaq_lightning.backends.kernels import NO_CONVOLUTION, SATURATION, Kernel, described, kernel_of
from tcaq_lightning.backends.packages import require
from tcaq_lightning.backends.saturation import sums_saturate
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.runtime.one_line import one_line

if TYPE_CHECKING:
    from onnx import ModelProto

EXTRA = "onnx"
MOVED = re.compile(r"_token_\d+$")
"""What ONNX Runtime appends to the name of a node that it rewrote for another layout."""
INTEGER_OPERATORS = frozenset(
    {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm"}
)
"""Of ONNX Runtime's optimised graph."""


@BACKENDS.register("onnxruntime")
class ONNXRuntime(EngineBackend):
    """ONNX Runtime; `provider` is such as `CPUExecutionProvider`, which is the default."""

    package = "onnxruntime"
    extra = EXTRA

    def can_run(self, layer: QuantLayer) -> str:
        """As for every engine; a convolution runs on integers only if its output is quantized too."""
        needs_float = layer.integer_output and layer.output_quantizer is None
        return super().can_run(layer) or (NO_CONVOLUTION if needs_float else "")

    def open(self, source: bytes | Path, info: GraphInfo | None = None, **settings: Any) -> Engine:
        """Start a session on a graph."""
        return ONNXRuntimeEngine(source, info, **settings)


class ONNXRuntimeEngine(Engine):
    """ONNX Runtime on an ONNX graph. Convolutions whose outputs stay in float run in float, other products on integers.

    Attributes:
        in_float: whether all products were kept off integer kernels, since 16-bit sums could saturate here.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        source: bytes | Path,
        info: GraphInfo | None = None,
        threads: int | None = None,
        provider: str | None = None,
        saturates: bool | None = None,
        optimised: Path | None = None,
    ) -> None:
        """Start a session.

        Args:
            source: an ONNX file's content, or the file.
            info: of the graph; None reads it from the file.
            threads: CPU threads; None leaves it to the engine.
            provider: such as `CPUExecutionProvider`, which is the default.
            saturates: whether 8-bit products are added in 16 bits; None asks the processor.
            optimised: where the optimised graph is written to; None writes none.
        """
        onnxruntime = require("onnxruntime", EXTRA)
        chosen = provider or "CPUExecutionProvider"
        if chosen not in onnxruntime.get_available_providers():
            raise UserError(
                f"provider: expected one of ONNX Runtime's {onnxruntime.get_available_providers()}, got {chosen!r}"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
        content: bytes | str = source if isinstance(source, bytes) else str(source)
        try:
            session = onnxruntime.InferenceSession(content, options, providers=[chosen])
            properties = session.get_modelmeta().custom_metadata_map
            self.info = info or GraphInfo.from_json(properties.get(METADATA_KEY, ""), str(source))
            # There is no choice by layer: all of them in float.
            risky = any(p.may_saturate for p in self.info.products)
            self.in_float = risky and (sums_saturate() if saturates is None else saturates)
            if self.in_float:
                options.add_session_config_entry("session.disable_quant_qdq", "1")
                session = onnxruntime.InferenceSession(content, options, providers=[chosen])
            self.session = session
        except UserError:
            raise
        except Exception as error:  # its exceptions share no base but this
            where = "the exported graph" if isinstance(source, bytes) else source
            raise UserError(f"ONNX Runtime cannot open {where}: {one_line(error)}; export it again") from error
        self.source, self.settings = source, {"threads": threads, "provider": provider, "saturates": saturates}

    def __call__(self, inputs: dict[str, Any]) -> Any:
        """The prediction."""
        return self.session.run(None, inputs)[0]

    def kernels(self) -> list[Kernel]:
        """What runs the quantized products; the graph is optimised anew to see it."""
        import onnx

        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "optimised.onnx"
            ONNXRuntimeEngine(self.source, self.info, **self.settings, optimised=file)
            return onnxruntime_kernels(
                onnx.load(str(file), load_external_data=False), self.info.products, self.in_float
            )


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
        operator = kernel_of(found, product.name, "not found")
        precision = "int8" if operator in INTEGER_OPERATORS else "float32"
        needs_float = product.operator == "Conv" and product.output_bits is None
        reason = SATURATION if in_float else NO_CONVOLUTION if needs_float else ""
        kernels.append(described(product, operator, precision, reason))
    return kernels
