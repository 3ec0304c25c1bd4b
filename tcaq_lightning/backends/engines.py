"""Engines that run the exported graph."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcaq_lightning.backends.graph.inputs import GraphInput
from tcaq_lightning.backends.graph.onnx_graph import METADATA_KEY, Product
from tcaq_lightning.backends.kernels import Kernel, onnxruntime_kernels, openvino_kernels
from tcaq_lightning.backends.saturation import sums_saturate
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import one_line

EXPORT_VERSION = 2
OPENVINO, ONNXRUNTIME = "openvino", "onnxruntime"
NO_EFFECT = 3e38
"""Bound of a Minimum that changes nothing, but that OpenVINO's low-precision passes do not look through."""


@dataclass(frozen=True)
class GraphInfo:
    """What a file says about its graph.

    Attributes:
        artifact: SHA-256 of the weights that it was made from.
        inputs: each of them by name, the noisy sample first.
        products: its quantized products.
    """

    artifact: str
    inputs: dict[str, GraphInput]
    products: list[Product]

    @classmethod
    def from_json(cls, text: str, where: str) -> GraphInfo:
        """Read the properties of a file.

        Raises:
            UserError: another version, or not written by this project.
        """
        try:
            values = json.loads(text)
            if (version := values["version"]) == EXPORT_VERSION:
                return cls(
                    values["artifact"],
                    {name: GraphInput.from_dict(row) for name, row in values["inputs"].items()},
                    [Product(**row) for row in values["products"]],
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: expected a graph that tcaq-lightning exported, got none of its properties; export it again"
            ) from error
        raise UserError(f"{where}: expected export version {EXPORT_VERSION}, got {version}; export it again")


Run = Callable[[dict[str, Any]], Any]
"""Maps numpy inputs by name to the prediction."""


class OpenVINOEngine:
    """OpenVINO on an ONNX graph or an IR.

    Attributes:
        in_float: names of products that were kept off integer kernels, whose 16-bit sums could saturate here.
    """

    name = OPENVINO

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
        openvino = require("openvino", OPENVINO)
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
        self._request = self.compiled.create_infer_request()

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
        """The prediction."""
        return self._request.infer(inputs)[0].copy()

    def kernels(self) -> list[Kernel]:
        """What runs the quantized products."""
        return openvino_kernels(self.compiled, self.info.products, self.in_float)


def _openvino_info(model: Any, where: str) -> GraphInfo:
    for path in (["framework", METADATA_KEY], [METADATA_KEY]):  # of an ONNX file, of an IR
        if model.has_rt_info(path):
            return GraphInfo.from_json(str(model.get_rt_info(path).astype(str)), where)
    return GraphInfo.from_json("", where)


class ONNXRuntimeEngine:
    """ONNX Runtime on an ONNX graph. Convolutions whose outputs stay in float run in float, other products on integers.

    Attributes:
        in_float: whether all products were kept off integer kernels, since 16-bit sums could saturate here.
    """

    name = ONNXRUNTIME

    def __init__(
        self,
        source: bytes | Path,
        info: GraphInfo | None = None,
        threads: int | None = None,
        provider: str | None = None,
        saturates: bool | None = None,
        optimised: Path | None = None,
    ) -> None:
        """Start a session; arguments as for OpenVINO, `provider` such as `CPUExecutionProvider`.

        `optimised` is where the optimised graph is written to.
        """
        onnxruntime = require("onnxruntime", "onnx")
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
        self.source, self.options, self.provider = source, {"threads": threads, "saturates": saturates}, chosen

    def __call__(self, inputs: dict[str, Any]) -> Any:
        """The prediction."""
        return self.session.run(None, inputs)[0]

    def kernels(self) -> list[Kernel]:
        """What runs the quantized products; the graph is optimised anew to see it."""
        import onnx

        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "optimised.onnx"
            again: Any = {**self.options, "provider": self.provider, "optimised": file}
            ONNXRuntimeEngine(self.source, self.info, **again)
            return onnxruntime_kernels(
                onnx.load(str(file), load_external_data=False), self.info.products, self.in_float
            )


ENGINES: dict[str, Any] = {OPENVINO: OpenVINOEngine, ONNXRUNTIME: ONNXRuntimeEngine}
"""Engines by the name of the backend. Extend to add one."""


def require(module: str, extra: str) -> Any:
    """Import a package of an extra.

    Raises:
        UserError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module} is not installed; expected the extra {extra!r}: pip install 'tcaq-lightning[{extra}]'"
        ) from error


def open_engine(
    backend: str, source: bytes | Path, info: GraphInfo | None, options: dict[str, Any], artifact: str | None = None
) -> Any:
    """An engine on a graph.

    Args:
        backend: key of `ENGINES`.
        source, info, options: as the engines take them.
        artifact: SHA-256 of the weights that the graph must have been made from.

    Raises:
        UserError: unknown backend, not installed, or another artifact's graph.
    """
    if backend not in ENGINES:
        raise UserError(f"backend: expected one of torch, {', '.join(ENGINES)}, got {backend!r}")
    if isinstance(source, Path) and not source.is_file():
        raise UserError(f"model: no such file: {source}; export it with python -m tcaq_lightning export")
    engine = ENGINES[backend](source, info, **options)
    if artifact is not None and engine.info.artifact != artifact:
        where = source if isinstance(source, Path) else "the graph"
        raise UserError(f"model: {where} was exported from another artifact; export this one again")
    return engine


def describe_kernels(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """JSON-ready rows."""
    return [
        {"name": k.product.name, "kernel": k.kernel, "precision": k.precision, "integer": k.integer, "reason": k.reason}
        for k in kernels
    ]
