"""OpenVINO: integer kernels of CPUs, on an ONNX graph or its own format."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tcaq_lightning.backends.base import BACKENDS
from tcaq_lightning.backends.engines import ONNX, Engine, EngineBackend
from tcaq_lightning.backends.graph.onnx_graph import METADATA_KEY, Product
from tcaq_lightning.backends.graph_checksum import (
    KEY,
    PLACEHOLDER,
    WEIGHTS_KEY,
    WEIGHTS_PLACEHOLDER,
    sealed,
    with_weights,
)
from tcaq_lightning.backends.graph_info import GraphInfo
from tcaq_lightning.backends.kernels import SATURATION, Kernel, described, kernel_of
from tcaq_lightning.backends.packages import require
from tcaq_lightning.backends.saturation import sums_saturate
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.files import sha256
from tcaq_lightning.runtime.one_line import one_line

EXTRA = "openvino"
NO_EFFECT = 3e38
"""Bound of a Minimum that changes nothing, but that OpenVINO's low-precision passes do not look through."""
LOWERED = "/DequantizationMultiply"
"""What OpenVINO appends to the name of a layer whose scale it moved behind it."""


@BACKENDS.register("openvino")
class OpenVINO(EngineBackend):
    """OpenVINO; `provider` is its device, `CPU` by default."""

    package = "openvino"
    extra = EXTRA
    formats = (ONNX, "openvino")

    def open(self, source: bytes | Path, info: GraphInfo | None = None, **settings: Any) -> Engine:
        """Compile a graph."""
        return OpenVINOEngine(source, info, **settings)


class OpenVINOEngine(Engine):
    """OpenVINO on an ONNX graph or an IR.

    Attributes:
        in_float: names of products that were kept off integer kernels, whose 16-bit sums could saturate here.
    """

    backend = "openvino"

    def __init__(
        self,
        source: bytes | Path,
        info: GraphInfo | None = None,
        threads: int | None = None,
        provider: str | None = None,
        saturates: bool | None = None,
    ) -> None:
        """Compile.

        Args:
            source: an ONNX file's content, or the file of an ONNX graph or an IR.
            info: of the graph; None reads it from the file.
            threads: CPU threads; None leaves it to the engine.
            provider: OpenVINO's device, `CPU` by default.
            saturates: whether 8-bit products are added in 16 bits; None asks the processor.
        """
        openvino = require("openvino", EXTRA)
        core = openvino.Core()
        device = provider or "CPU"
        if device not in core.available_devices:
            raise UserError(f"provider: expected one of OpenVINO's devices {core.available_devices}, got {device!r}")
        try:
            model = core.read_model(source if isinstance(source, bytes) else str(source))
            self.info = info or _openvino_info(model, str(source))
            self.in_float = self._avoid_saturation(openvino, model, saturates)
            options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
            if threads is not None:
                options["INFERENCE_NUM_THREADS"] = str(threads)
            self.compiled = core.compile_model(model, device, options)
        except RuntimeError as error:
            where = "the exported graph" if isinstance(source, bytes) else source
            raise UserError(f"OpenVINO cannot open {where}: {one_line(error)}; export it again") from error
        self.source, self.settings = source, {"threads": threads, "provider": provider, "saturates": saturates}
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()  # requests that no call has now

    def _avoid_saturation(self, openvino: Any, model: Any, saturates: bool | None) -> list[str]:
        """Keep products whose sums could saturate off integer kernels: they then run in float, on the same values."""
        if not (sums_saturate() if saturates is None else saturates):
            return []
        names = {p.name for p in self.info.products if p.may_saturate}
        operators = {op.get_friendly_name(): op for op in model.get_ops()}
        for name in names & operators.keys():
            # an ONNX convolution with a bias is two operators here, and its name is the addition's
            product = operators.get(f"{name}/WithoutBiases", operators[name])
            target = product.input(0)
            bound = openvino.opset13.constant(NO_EFFECT, dtype="float32")
            barrier = openvino.opset13.minimum(target.get_source_output(), bound)
            target.replace_source_output(barrier.output(0))
        return sorted(names)

    def __call__(self, inputs: dict[str, Any]) -> Any:
        """The prediction; as many calls may run at once as there are threads."""
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = self.compiled.create_infer_request()
        try:
            return request.infer(inputs)[0].copy()
        finally:
            self._idle.put(request)

    def kernels(self) -> list[Kernel]:
        """What runs the quantized products."""
        return openvino_kernels(self.compiled, self.info.products, self.in_float)


def _openvino_info(model: Any, where: str) -> GraphInfo:
    for path in (["framework", METADATA_KEY], [METADATA_KEY]):  # of an ONNX file, of an IR
        if model.has_rt_info(path):
            return GraphInfo.from_json(str(model.get_rt_info(path).astype(str)), where)
    return GraphInfo.from_json("", where)


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
    return [described(p, *kernel_of(found, p.name, missing), SATURATION if p.name in kept else "") for p in products]


def write_ir(content: bytes, file: Path) -> None:
    """Write an ONNX graph in OpenVINO's own format: an .xml file with a .bin file beside it.

    Args:
        content: of the ONNX file.
        file: the .xml file.
    """
    openvino = require("openvino", EXTRA)
    model = openvino.Core().read_model(content)
    text = model.get_rt_info(["framework", METADATA_KEY]).astype(str)
    model.set_rt_info(text, METADATA_KEY)
    model.set_rt_info("of the ONNX graph", ["framework", KEY])
    model.set_rt_info(PLACEHOLDER, KEY)
    model.set_rt_info(WEIGHTS_PLACEHOLDER, WEIGHTS_KEY)
    openvino.save_model(model, str(file), compress_to_fp16=False)
    file.write_bytes(sealed(with_weights(file.read_bytes(), sha256(file.with_suffix(".bin")))))
