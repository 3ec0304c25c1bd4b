"""Export an artifact to a file: build the graph, see what the engines make of it, and only then write it."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcaq_lightning.artifact.directory import weights_digest
from tcaq_lightning.backends.engines import ONNX, describe_kernels, engines, open_engine
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.backends.graph.inputs import call_of, example_inputs, nest, pipeline_sizes
from tcaq_lightning.backends.graph_info import GraphInfo
from tcaq_lightning.backends.kernels import check_kernels, table
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.backends.openvino import EXTRA, write_ir
from tcaq_lightning.backends.packages import require
from tcaq_lightning.backends.placement import put_in_place, target_file
from tcaq_lightning.backends.saturation import sums_saturate
from tcaq_lightning.backends.stand_in import EngineDenoiser
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import Sizes
from tcaq_lightning.models.pipelines import find_denoiser
from tcaq_lightning.runtime.files import write_json

OPENVINO = "openvino"
"""The format of OpenVINO, which writes and opens it."""
SUFFIXES = {ONNX: ".onnx", OPENVINO: ".xml"}
NAME = "denoiser"
GROSS_ERROR = 0.05
"""Relative squared error to the simulation on noise above which the graph is of another model. Rounding that falls
the other way at ties stays far below."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: the graph's files and the record beside them.
        lines: what to tell the user.
    """

    files: list[Path]
    lines: list[str]


def export_artifact(
    path: str,
    output: Path,
    graph_format: str,
    four_bit: bool = True,
    tokens: int | None = None,
    latents: tuple[int, int] | None = None,
    allow_float: bool = False,
    threads: int | None = None,
) -> Exported:
    """Write the graph of an artifact's denoiser.

    Args:
        path: the artifact.
        output: a file ending in .onnx or .xml, or a directory for `denoiser.onnx` or `denoiser.xml`.
        graph_format: `onnx` or `openvino`.
        four_bit: store codes of at most 4 bits in 4 bits, else in 8.
        tokens: length of the context, where the denoiser attends to one; None takes the pipeline's own.
        latents: height and width of the noisy sample; None takes the denoiser's own.
        allow_float: write the file although products fell back to float.
        threads: CPU threads of the check.

    Raises:
        UserError: no artifact, an engine that is not installed, something that cannot be exported, a product that fell
            back to float, or a prediction that is not the simulated one.
    """
    if graph_format not in SUFFIXES:
        raise UserError(f"--format must be one of {', '.join(SUFFIXES)}, got {graph_format!r}")
    require("onnx", ONNX)
    if graph_format == OPENVINO:
        require("openvino", EXTRA)
    target = target_file(output, NAME, SUFFIXES[graph_format], SUFFIXES.values())
    pipeline = load_quantized(path)
    _, denoiser = find_denoiser(pipeline)
    sizes = pipeline_sizes(pipeline, tokens, latents)
    content, info = build_graph(denoiser, weights_digest(path), sizes, four_bit)
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / target.name
        if graph_format == OPENVINO:
            write_ir(content, first)
        else:
            first.write_bytes(content)
        installed, absent = _engines(graph_format)
        record: dict[str, Any] = {
            "format": graph_format,
            "inputs": {name: list(described.sizes()) for name, described in info.inputs.items()},
            "products": [asdict(product) for product in info.products],
            "bytes": sum(file.stat().st_size for file in Path(scratch).iterdir()),
            "engines": {},
        }
        lines = []
        for name in installed:
            found = _check(name, first, denoiser, sizes, allow_float, threads)
            record["engines"][name] = found[0]
            lines.append(found[1])
        lines += _summary(info, four_bit)
        lines += [f"{name} is not installed: its kernels were not checked" for name in absent]
        write_json(first.with_suffix(".json"), record)
        files = put_in_place(Path(scratch), target.parent)
    return Exported(files, lines)


def _engines(graph_format: str) -> tuple[list[str], list[str]]:
    """Names of the engines that open a format: installed ones, and others."""
    found = engines(graph_format)
    installed = [name for name, engine in found.items() if importlib.util.find_spec(engine.package)]
    return installed, [name for name in found if name not in installed]


@torch.no_grad()
def _check(
    name: str, file: Path, denoiser: nn.Module, sizes: Sizes, allow_float: bool, threads: int | None
) -> tuple[dict[str, Any], str]:
    """Kernels and error of the file in one engine."""
    engine = open_engine(name, file, None, {"threads": threads})
    kernels = engine.kernels()
    if not allow_float:
        check_kernels(kernels, name)
    inputs = example_inputs(denoiser, sizes)
    stand_in = EngineDenoiser(engine, type(denoiser), denoiser.config)
    expected = denoiser(**call_of(denoiser, inputs), return_dict=False)[0].double()
    squared = (stand_in(**nest(inputs), return_dict=False)[0].double() - expected).square().sum()
    error = float(squared / expected.square().sum())
    if not error <= GROSS_ERROR:
        raise UserError(
            f"{name} predicts something else than the simulated model: relative error {error:.3g}, expected at most "
            f"{GROSS_ERROR}; use another release of {name}, or --four_bit false if codes are stored in 4 bits"
        )
    record = {"relative_error_on_noise": error, "kernels": describe_kernels(kernels)}
    return record, f"{table(kernels, name)}\n{name}: relative error to the simulated model on noise {error:.2g}"


def _summary(info: GraphInfo, four_bit: bool) -> list[str]:
    weights = [p for p in info.products if p.weight_bits]
    stored = {kind: sum(p.stored == kind for p in weights) for kind in ("int4", "int8", "uint8")}
    lines = ["weights: " + ", ".join(f"{count} stored as {kind}" for kind, count in stored.items() if count)]
    if four_bit and stored["int4"] < len(weights):
        lines[0] += "; codes of 5 to 8 bits are stored in 8"
    if risky := [p.name for p in info.products if p.may_saturate]:
        here = "this processor is one" if sums_saturate() else "not this one"
        lines.append(
            f"8-bit sums: {len(risky)} products, such as {risky[0]}, may saturate in 16 bits on x86 processors without "
            f"VNNI ({here}); there load_quantized runs them in float"
        )
    return lines
