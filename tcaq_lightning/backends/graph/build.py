"""From a frozen denoiser to a graph in memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.artifact.structure import describe
from tcaq_lightning.backends.graph.denoiser import GraphDenoiser
from tcaq_lightning.backends.graph.inputs import GraphInput, call_of, example_inputs
from tcaq_lightning.backends.graph.onnx_graph import finish, trace
from tcaq_lightning.backends.graph_checksum import sealed
from tcaq_lightning.backends.graph_info import EXPORT_VERSION, GraphInfo
from tcaq_lightning.backends.packages import require
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import Sizes
from tcaq_lightning.runtime.one_line import one_line
from tcaq_lightning.runtime.version import VERSION


def build_graph(
    denoiser: nn.Module, artifact: str, sizes: Sizes | None = None, narrow: bool = True
) -> tuple[bytes, GraphInfo]:
    """The ONNX graph of a frozen denoiser, which stays as it is.

    Args:
        denoiser: frozen.
        artifact: SHA-256 of its weights, which the graph remembers.
        sizes: of the inputs that it is made for; None is the usual ones.
        narrow: store codes of at most 4 bits in 4 bits.

    Returns:
        The file's content, and what it says about itself.

    Raises:
        UserError: onnx is not installed; an input, a layer or an operator that the exporter does not know.
    """
    require("onnx", "onnx")
    structure = describe(denoiser)
    inputs = example_inputs(denoiser, sizes)
    if sizes is not None and sizes.latents is not None:
        _try_latents(denoiser, inputs, sizes.latents)
    _, _, *further = inputs
    graph = GraphDenoiser(denoiser, structure.boundaries, tuple(further)).eval()
    model = trace(graph, inputs)
    taken = {name: GraphInput.of(name, x) for name, x in inputs.items()}
    metadata: dict[str, Any] = {
        "version": EXPORT_VERSION,
        "tcaq_lightning": VERSION,
        "denoiser": type(denoiser).__name__,
        "artifact": artifact,
        "inputs": {name: asdict(described) for name, described in taken.items()},
        "timestep_boundaries": structure.boundaries,
    }
    products = finish(model, graph, metadata, narrow)
    info = GraphInfo(artifact, taken, products)
    content = sealed(model.SerializeToString())
    return content, info


@torch.no_grad()
def _try_latents(denoiser: nn.Module, inputs: dict[str, Tensor], latents: tuple[int, int]) -> None:
    """Check that a denoiser takes samples of that height and width; tracing would blame its operators."""
    try:
        denoiser(**call_of(denoiser, inputs))
    except Exception as error:  # a model raises whatever it likes
        raise UserError(
            f"latents: a {type(denoiser).__name__} takes no samples of {latents[0]} x {latents[1]}: {one_line(error)}; "
            f"expected a height and width that it can halve as often as it does, such as its sample_size"
        ) from error
