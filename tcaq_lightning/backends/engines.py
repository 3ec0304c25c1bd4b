"""Engines: backends that run the exported graph of a denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn

from tcaq_lightning.artifact.directory import OpenedArtifact
from tcaq_lightning.artifact.saved import SavedDenoiser
from tcaq_lightning.backends.base import BACKENDS, LEARNS, Backend, find_backend
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.backends.graph.inputs import pipeline_sizes
from tcaq_lightning.backends.graph_checksum import check_graph
from tcaq_lightning.backends.graph_info import GraphInfo
from tcaq_lightning.backends.integers import fits_int8
from tcaq_lightning.backends.kernels import ASYMMETRIC, Kernel
from tcaq_lightning.backends.packages import require
from tcaq_lightning.backends.stand_in import EngineDenoiser
from tcaq_lightning.config.checks import FLOAT_BITS
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.quantizers import CodedWeight

ONNX = "onnx"
"""The format of a graph that every engine opens."""


class Engine(ABC):
    """A graph that was opened. Copies and stored ones open it again.

    Attributes:
        backend: name of the backend that opened it.
        info: what the graph says about itself.
        source: an ONNX file's content, or the file of a graph.
        settings: with which it was opened.
    """

    backend: ClassVar[str]
    info: GraphInfo
    source: bytes | Path
    settings: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is opened again; a file must then be there still, and of the same artifact."""
        source = self.source if isinstance(self.source, bytes) else self.source.resolve()
        info = self.info if isinstance(source, bytes) else None
        return open_engine, (self.backend, source, info, self.settings, self.info.artifact)

    @abstractmethod
    def __call__(self, inputs: dict[str, Any]) -> Any:
        """The prediction, for numpy inputs by name; of any number of threads at once."""

    @abstractmethod
    def kernels(self) -> list[Kernel]:
        """What runs the quantized products."""


class EngineBackend(Backend):
    """A backend that runs the exported graph; a subclass says how it opens one."""

    options = ("model", "threads", "provider", "tokens", "latents")
    package: ClassVar[str]
    """What has to be installed."""
    extra: ClassVar[str]
    """The extra that installs it."""
    formats: ClassVar[tuple[str, ...]] = (ONNX,)
    """Formats of `export` that it opens."""

    def check(self) -> None:
        """The engine must be there; what makes graphs is asked for where one is made."""
        require(self.package, self.extra)

    @abstractmethod
    def open(self, source: bytes | Path, info: GraphInfo | None = None, **settings: Any) -> Engine:
        """Open a graph.

        Args:
            source: an ONNX file's content, or the file of a graph.
            info: of the graph; None reads it from the file.
            settings: `threads` and `provider`, where they are given.

        Raises:
            UserError: the engine is not installed, or cannot open it.
        """

    def can_run(self, layer: QuantLayer) -> str:
        """Why a layer's product has no integers that a kernel takes.

        Beyond that an engine chooses its kernels itself, and avoids sums that saturate on this processor: its own
        `Engine.kernels` lists what it does with a graph.
        """
        weight = layer.weight_quantizer
        if weight.learns:
            return LEARNS
        if not weight.number_format.integers:
            return f"weights in the number format {weight.number_format.name}, which cannot be exported"
        if layer.spec.activation_bits == FLOAT_BITS:
            return "inputs in floating point"
        return "" if fits_int8(cast("CodedWeight", weight)) else ASYMMETRIC

    def build(self, opened: OpenedArtifact, options: Mapping[str, Any]) -> nn.Module:
        """What stands for the denoiser in the pipeline and runs its exported graph.

        Args:
            opened: the artifact.
            options: `model`, a file that the command `export` wrote (without it the graph is made now); `threads`;
                `provider`, the engine's device or provider; `tokens`, length of the context of a denoiser that attends
                to one; `latents`, (height, width) of the noisy sample.

        Raises:
            UserError: the engine is not installed or cannot open the graph, or it is another artifact's.
        """
        denoiser: Any = opened.denoiser
        settings = {key: value for key, value in options.items() if key in ("threads", "provider")}
        if options.get("model") is not None:
            engine = open_engine(self.name, Path(options["model"]), None, settings, opened.digest)
        else:
            sizes = pipeline_sizes(opened.pipeline, options.get("tokens"), options.get("latents"))
            content, info = build_graph(denoiser, opened.digest, sizes)
            engine = open_engine(self.name, content, info, settings)
        pipeline: Any = opened.pipeline
        pipeline._exclude_from_cpu_offload = [
            *pipeline._exclude_from_cpu_offload,
            opened.denoiser_name,
        ]  # has no weights
        saved = SavedDenoiser(opened.directory / opened.denoiser_name, opened.digest)
        stand_in: nn.Module = EngineDenoiser(engine, type(denoiser), denoiser.config, saved).eval()
        return stand_in


def engines(graph_format: str = ONNX) -> dict[str, EngineBackend]:
    """Backends that open a format of `export`, by name."""
    found = {name: find_backend(name) for name in BACKENDS}
    return {n: b for n, b in found.items() if isinstance(b, EngineBackend) and graph_format in b.formats}


def open_engine(
    backend: str, source: bytes | Path, info: GraphInfo | None, settings: dict[str, Any], artifact: str | None = None
) -> Engine:
    """Open a graph in an engine.

    Args:
        backend: name of the engine.
        source: as in `EngineBackend.open`.
        info: likewise.
        settings: likewise.
        artifact: SHA-256 of the weights that the graph must have been made from.

    Raises:
        UserError: no such engine, not installed, or another artifact's graph.
    """
    found = find_backend(backend)
    if not isinstance(found, EngineBackend):
        raise UserError(f"backend: expected one of {', '.join(engines())}, which open graphs, got {backend!r}")
    if isinstance(source, Path) and not source.is_file():
        raise UserError(f"model: no such file: {source}; export it with python -m tcaq_lightning export")
    if isinstance(source, Path):
        check_graph(source)
    engine = found.open(source, info, **settings)
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
