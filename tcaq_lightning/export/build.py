"""From a frozen denoiser to a graph in memory."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning import __version__
from tcaq_lightning.errors import UserError
from tcaq_lightning.export.denoiser import GraphDenoiser
from tcaq_lightning.export.engines import EXPORT_VERSION, GraphInfo, require
from tcaq_lightning.export.onnx_graph import finish, trace
from tcaq_lightning.frozen import describe
from tcaq_lightning.pipelines import sample_shape

EXAMPLE_BATCH = 2


TOKENS = 77
"""Length of CLIP's contexts."""


def context_tokens(pipeline: Any) -> int:
    """Length of the context that a pipeline's denoiser attends to: a class' single token, or its tokenizer's."""
    if getattr(pipeline, "class_embedder", None) is not None:
        return 1
    length = getattr(getattr(pipeline, "tokenizer", None), "model_max_length", None)
    return length if isinstance(length, int) and length < 10_000 else TOKENS  # some tokenizers know no limit


def example_inputs(denoiser: Any, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Inputs of a denoiser by name: the sample, the timestep, and what its config says it is conditioned on.

    Args:
        denoiser: of diffusers.
        tokens: length of the context, where it attends to one.

    Raises:
        UserError: an input that the exporter does not know.
    """
    config, batch = denoiser.config, EXAMPLE_BATCH
    parameters = inspect.signature(denoiser.forward).parameters
    generator = torch.Generator().manual_seed(0)
    inputs = {
        next(iter(parameters)): torch.randn(batch, *sample_shape(denoiser), generator=generator),
        "timestep": torch.tensor([250.0, 750.0]),
    }
    width = config.get("cross_attention_dim")
    if "encoder_hidden_states" in parameters and width:
        width = width if isinstance(width, int) else width[0]
        inputs["encoder_hidden_states"] = torch.randn(batch, tokens, width, generator=generator)
    kinds = [key for key in ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type") if config.get(key)]
    if kinds:
        raise UserError(
            f"cannot export a {type(denoiser).__name__} with {kinds[0]} {config[kinds[0]]!r}: expected inputs sample, "
            f"timestep, encoder_hidden_states and class_labels alone"
        )
    if "class_labels" in parameters and (config.get("num_class_embeds") or config.get("num_embeds_ada_norm")):
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long)
    return inputs


def build_graph(
    denoiser: nn.Module, artifact: str, tokens: int = TOKENS, narrow: bool = True
) -> tuple[bytes, GraphInfo]:
    """The ONNX graph of a frozen denoiser, which stays as it is.

    Args:
        denoiser: frozen.
        artifact: SHA-256 of its weights, which the graph remembers.
        tokens: length of the context, where the denoiser attends to one.
        narrow: store codes of at most 4 bits in 4 bits.

    Returns:
        The file's content, and what it says about itself.

    Raises:
        UserError: onnx is not installed; an input, a layer or an operator that the exporter does not know.
    """
    require("onnx", "onnx")
    structure = describe(denoiser)
    inputs = example_inputs(denoiser, tokens)
    _, _, *further = inputs
    graph = GraphDenoiser(denoiser, structure.boundaries, tuple(further)).eval()
    model = trace(graph, inputs)
    shapes = {name: (list(x.shape[1:]), str(x.dtype).removeprefix("torch.")) for name, x in inputs.items()}
    metadata: dict[str, Any] = {
        "version": EXPORT_VERSION,
        "tcaq_lightning": __version__,
        "denoiser": type(denoiser).__name__,
        "artifact": artifact,
        "inputs": shapes,
        "timestep_boundaries": structure.boundaries,
    }
    products = finish(model, graph, metadata, narrow)
    info = GraphInfo(artifact, shapes, products)
    content: bytes = model.SerializeToString()
    return content, info
