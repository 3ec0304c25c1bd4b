"""The coverage table: every layer with parameters and every attention matmul, with its bits or why it has none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import GaussianFourierProjection
from torch import nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.layers import LAYERS, QuantLayer
from tcaq_lightning.nn.rules import LayerBits
from tcaq_lightning.nn.spec import AttentionSpec, LayerSpec

FLOAT_LAYERS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.Embedding, GaussianFourierProjection)
"""Modules whose parameters stay in full precision: norms, look-ups, and the fixed frequencies of a time projection."""


KEPT_BY_RULE = "kept by rule"
"""Note of what a rule keeps in full precision."""


ELEMENTWISE = "added or multiplied elementwise"
"""Note of parameters that are no layer's: tables, gates, tokens."""


OWN_CODE = "read by its module's own code"
"""Note of matrices that belong to no layer: routers of experts, frequencies, bases."""


UNKNOWN_ATTENTION = "unknown attention"
"""How the note begins of matmuls in full precision because no quantized processor is known."""


WEIGHT_ONLY = "activations in floating point"
"""Note of matmuls whose operands are not quantized."""


DYNAMIC = "dynamic per token"
"""Note of layers whose inputs are quantized with steps found at run time."""


@dataclass(frozen=True)
class CoverageRow:
    """One line of the coverage table.

    Attributes:
        name: of the layer, or of the attention with the matmul, such as `mid_block.attentions.0 (q k^T)`.
        kind: module class, or `matmul`.
        bits: such as `W4 A8`, with a quantized output `W4 A8 O8`, in another number format `W3(pow2) A8`, or `float`.
        note: why it is in full precision, or empty.
        parameters: number of parameters that the row accounts for.
        role: of a layer with weights, what it is for in the denoiser; else empty.
    """

    name: str
    kind: str
    bits: str
    note: str
    parameters: int
    role: str = ""


def layer_row(name: str, spec: LayerSpec, parameters: int) -> CoverageRow:
    """The row of a layer with weights.

    Args:
        name: of the layer.
        spec: what it is.
        parameters: number of its parameters.
    """
    note = KEPT_BY_RULE if spec.kept else DYNAMIC if spec.dynamic else ""
    return CoverageRow(name, spec.kind, spec.widths, note, parameters, spec.role)


def attention_rows(name: str, spec: AttentionSpec, note: str) -> list[CoverageRow]:
    """The rows of an attention's matmuls; `note` says why they are in full precision, if they are.

    Args:
        name: of the attention.
        spec: what it is.
        note: why it stays in full precision; empty if it does not.
    """
    products = ("q k^T", f"A{spec.activation_bits}"), ("P v", f"P{spec.softmax_bits}")
    calls = [name, *(f"{name}, call {number}" for number in range(2, spec.calls + 1))]
    return [
        CoverageRow(
            f"{call} ({product})", "matmul", "float" if spec.kept else f"{first} A{spec.activation_bits}", note, 0
        )
        for call in calls
        for product, first in products
    ]


def own_parameters(module: nn.Module) -> int:
    """Number of parameters that a module has itself, those of modules within left out."""
    return sum(p.numel() for p in module.parameters(recurse=False))


def float_rows(name: str, module: nn.Module, bits: LayerBits) -> list[CoverageRow]:
    """Rows of the parameters that a module has itself and that stay in full precision.

    In a module without others within, a vector belongs to a norm or a scale. In a module with others within, a
    parameter that is not called a weight is a table, a gate or a token. Anything else is listed as what the module's
    own code reads: it may be an operand of a product.

    Args:
        name: of the module within the denoiser.
        module: any module that no quantized layer replaces.
        bits: what the rules say about its name.

    Raises:
        UserError: it is a layer that no quantized one is known for, and no rule keeps it.
    """
    own, kind = own_parameters(module), type(module).__name__
    if not own:
        return []
    if isinstance(module, FLOAT_LAYERS):
        return [CoverageRow(name, kind, "float", "normalisation or look-up", own)]
    if bits.kept:
        return [CoverageRow(name, kind, "float", KEPT_BY_RULE, own)]
    leaf = not any(True for _ in module.children())
    product = isinstance(module, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd))
    rows = []
    if product:
        raise UserError(
            f"unsupported layer {name} ({kind}) has weights that no quantized layer is known for; keep it in full "
            f"precision with a rule: quantization.rules: [{{pattern: {name}, keep: true}}]"
        )
    for parameter_name, parameter in module.named_parameters(recurse=False):
        full_name = f"{name}.{parameter_name}" if name else parameter_name
        vector = all(size == 1 for size in parameter.shape[:-1])
        read = not vector and (leaf or parameter_name.endswith("weight"))
        note = OWN_CODE if read else ELEMENTWISE
        rows.append(CoverageRow(full_name, "parameter", "float", note, parameter.numel()))
    return rows


@torch.no_grad()
def uncovered(denoiser: nn.Module, rows: list[CoverageRow]) -> list[str]:
    """Names of layers with weights that the coverage table does not account for."""
    listed = {row.name for row in rows}
    return [n for n, m in denoiser.named_modules() if isinstance(m, (*LAYERS, QuantLayer)) and n not in listed]
