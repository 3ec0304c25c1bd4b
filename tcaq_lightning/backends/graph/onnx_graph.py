"""The ONNX graph of a frozen denoiser: traced, then its integers stored as narrow as they are."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tcaq_lightning.backends.graph.attention import GraphAttention
from tcaq_lightning.backends.graph.denoiser import GraphDenoiser
from tcaq_lightning.backends.graph.layers import GraphConv2d, GraphLayer
from tcaq_lightning.backends.graph.tracing import Rewriting, without_dump
from tcaq_lightning.backends.graph_checksum import KEY, PLACEHOLDER
from tcaq_lightning.backends.saturation import may_saturate, pair_may_saturate
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.denoiser_calls import SHARED
from tcaq_lightning.models.families import is_attention
from tcaq_lightning.quantizers.output import OUTPUT_BITS
from tcaq_lightning.runtime.one_line import one_line

if TYPE_CHECKING:
    from onnx import ModelProto

TRACED_OPSET = 20
"""What torch's tracing exporter writes at most."""
OPSET = 21
"""Of the file: the first with 4-bit integers. None of the operators that are used changed its meaning since 20."""
IR_VERSION = 10
NARROW_BITS = 4
"""Widest codes that are stored in 4 bits."""
METADATA_KEY = "tcaq_lightning"
OUTPUT = "prediction"


@dataclass(frozen=True)
class Product:
    """One quantized product of the graph, named as in the coverage table.

    Attributes:
        name: of the layer, or of the attention with the matmul, such as `mid_block.attentions.0 (q k^T)`.
        operator: of ONNX.
        weight_bits: code width of the weight; None in a product of two activations.
        activation_bits: code width of the activations.
        stored: type that the weight is stored in, or empty.
        integer: whether an integer kernel can take its codes.
        note: why not.
        may_saturate: whether 16-bit sums, on processors without VNNI, may be too narrow for it.
        output_bits: code width of a quantized output, else None.
    """

    name: str
    operator: str
    weight_bits: int | None
    activation_bits: int
    stored: str
    integer: bool
    note: str = ""
    may_saturate: bool = False
    output_bits: int | None = None


def trace(denoiser: GraphDenoiser, inputs: dict[str, Tensor]) -> ModelProto:
    """The graph of a denoiser for any batch size.

    Args:
        denoiser: to be traced.
        inputs: example values by name: the sample first, then the timestep, then the further inputs.

    Raises:
        UserError: an operator that the exporter does not know.
    """
    import onnx

    if not hasattr(torch.onnx, "export"):  # pragma: no cover
        raise UserError("this torch has no ONNX exporter; install torch>=2.4")
    stream = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad(), Rewriting(), without_dump():
            warnings.simplefilter("ignore")  # on sizes that become numbers of the graph, which is meant
            torch.onnx.export(
                denoiser,
                tuple(inputs.values()),
                stream,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=TRACED_OPSET,
                input_names=list(inputs),
                output_names=[OUTPUT],
                do_constant_folding=False,  # it would store products of small constants: engines make them at load
                dynamic_axes={name: {0: "batch"} for name in (*inputs, OUTPUT) if name not in SHARED},
            )
    except UserError:
        raise
    except Exception as error:  # the exporter and models raise whatever they like
        raise UserError(
            f"cannot export a {type(denoiser.denoiser).__name__}: expected operators that ONNX opset {OPSET} has, "
            f"got {one_line(error)}"
        ) from error
    model = onnx.load_from_string(stream.getvalue())
    model.ir_version = IR_VERSION
    model.opset_import[0].version = OPSET
    return model


def finish(model: ModelProto, denoiser: GraphDenoiser, metadata: dict[str, Any], narrow: bool = True) -> list[Product]:
    """Name the products, store the codes in 4 bits where they fit and say what the file is, in place.

    Args:
        model: from `trace`.
        denoiser: that was traced.
        metadata: JSON values for the file's properties; the products are added.
        narrow: whether to store codes of at most 4 bits in 4 bits. A Cast to int8 follows, which engines do once, at
            load: their patterns for integer kernels know int8.

    Returns:
        The products in execution order.
    """
    import onnx

    layers = {f"denoiser.{name}": module for name, module in denoiser.denoiser.named_modules()}
    products = _name_products(model, layers, narrow)
    _skip_identities(model)
    _drop_zero_points(model)
    _lift_constants(model)
    _merge_initializers(model)
    _shorten_names(model, {product.name for product in products})
    if narrow:
        _store_narrow(model, {n: m for n, m in layers.items() if isinstance(m, GraphLayer) and _is_narrow(m)})
    model.producer_name, model.producer_version = "tcaq-lightning", metadata.get("tcaq_lightning", "")
    model.graph.name = type(denoiser.denoiser).__name__
    properties = metadata | {"products": [asdict(product) for product in products]}
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(properties), KEY: PLACEHOLDER})
    onnx.checker.check_model(model)
    return products


def _is_narrow(layer: GraphLayer) -> bool:
    fits = int(layer.codes.min()) >= -8 and int(layer.codes.max()) <= 7  # asymmetric codes may not
    return layer.bits <= NARROW_BITS and bool((layer.zero_point == 0).all()) and fits


def _name_products(model: ModelProto, modules: dict[str, nn.Module], narrow: bool) -> list[Product]:
    made_by = {output: node for node in model.graph.node for output in node.output}
    products = []
    seen: dict[str, int] = {}
    runs: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        weight = made_by.get(node.input[1])
        code_name = weight.input[0] if weight is not None and weight.op_type == "DequantizeLinear" else ""
        layer = modules.get(code_name.removesuffix(".codes"))
        if isinstance(layer, GraphLayer):
            product = _layer_product(layer, node.op_type, narrow)
        else:
            attention = _attention_of(node.name, modules)
            if attention is None:
                continue
            count = seen[attention] = seen.get(attention, 0) + 1
            product = _attention_product(attention.removeprefix("denoiser."), modules[attention], count == 1)
        runs[product.name] = run = runs.get(product.name, 0) + 1
        if run > 1:
            product = replace(product, name=f"{product.name} ({run})")
        node.name = product.name
        products.append(product)
    return products


def _layer_product(layer: GraphLayer, operator: str, narrow: bool) -> Product:
    integer = bool((layer.zero_point == 0).all())
    rows = layer.codes if isinstance(layer, GraphConv2d) else layer.codes.t()
    container = "int8" if layer.codes.dtype is torch.int8 else "uint8"
    return Product(
        layer.name,
        operator,
        layer.bits,
        layer.inputs.bits,
        "int4" if narrow and _is_narrow(layer) else container,
        integer,
        "" if integer else "asymmetric weight of 8 bits: its codes do not fit int8",
        integer and may_saturate(rows, layer.inputs.code_bits),
        None if layer.offset is None else OUTPUT_BITS,
    )


def _attention_of(node_name: str, modules: dict[str, nn.Module]) -> str | None:
    """Name of the attention whose matmul of two activations a traced node is."""
    scope, found, _ = node_name.strip("/").replace("/", ".").rpartition(".processor.")
    module = modules.get(scope) if found else None
    quantized = module is not None and is_attention(module) and isinstance(module.processor, GraphAttention)
    return scope if quantized else None


def _attention_product(name: str, attention: Any, scores: bool) -> Product:
    processor: Any = attention.processor
    if scores:
        first, integer = processor.query.bits, True
    else:
        first, integer = processor.probabilities.bits, processor.probabilities.integer
    second = processor.key.bits if scores else processor.value.bits
    note = "" if integer else "logarithmic codes of the probabilities: no integer kernel takes them"
    name = f"{name} ({'q k^T' if scores else 'P v'})"
    narrow_sums = integer and pair_may_saturate(first, second)
    return Product(name, "MatMul", None, second, "", integer, note, narrow_sums)


def _skip_identities(model: ModelProto) -> None:
    """Let nodes read constants themselves, not copies of equal ones as torch writes them."""
    sources = {tensor.name: tensor.name for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in sources:
            sources[node.output[0]] = sources[node.input[0]]
            continue
        for position, name in enumerate(node.input):
            node.input[position] = sources.get(name, name)
        kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _drop_zero_points(model: ModelProto) -> None:
    """Leave out the weights' zero points of 0, which is what their absence means."""
    import onnx

    zeros = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.name.endswith(".zero_point") and not onnx.numpy_helper.to_array(tensor).any()
    }
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and node.input[2] in zeros:
            del node.input[2]
    _drop_initializers(model, zeros)


def _lift_constants(model: ModelProto) -> None:
    """Constant nodes as initializers, so that equal ones can be merged."""
    kept = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _shorten_names(model: ModelProto, kept: set[str]) -> None:
    """Number what has no meaning outside of the graph; names of modules would be half of a small model's file."""
    fixed = {value.name for value in (*model.graph.input, *model.graph.output)}
    names: dict[str, str] = {"": ""} | {name: name for name in fixed}
    for tensor in model.graph.initializer:
        if not tensor.name.endswith((".codes", ".scale")):
            tensor.name = names.setdefault(tensor.name, f"c{len(names)}")
        else:
            names[tensor.name] = tensor.name
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.setdefault(name, f"v{len(names)}") for name in values]
        if node.name not in kept:
            node.name = ""
    del model.graph.value_info[:]


def _merge_initializers(model: ModelProto) -> None:
    """Keep equal constants once, and none that nothing reads."""
    kept: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    for tensor in model.graph.initializer:
        key = (tensor.data_type, tuple(tensor.dims), tensor.raw_data)
        if tensor.raw_data and not tensor.name.endswith(".codes"):
            renamed[tensor.name] = kept.setdefault(key, tensor.name)
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
    used = {name for node in model.graph.node for name in node.input}
    _drop_initializers(model, {tensor.name for tensor in model.graph.initializer} - used)


def _drop_initializers(model: ModelProto, names: set[str]) -> None:
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _store_narrow(model: ModelProto, layers: dict[str, GraphLayer]) -> None:
    from onnx import TensorProto, helper

    for tensor in model.graph.initializer:
        layer = layers.get(tensor.name.removesuffix(".codes"))
        if layer is None or not tensor.name.endswith(".codes"):
            continue
        flat = layer.codes.flatten().to(torch.uint8) & 0xF
        if flat.numel() % 2:
            flat = torch.cat([flat, flat.new_zeros(1)])
        packed = (flat[0::2] | (flat[1::2] << 4)).numpy().tobytes()  # two's complement, low half first
        tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.INT4, list(layer.codes.shape), packed, raw=True))
    nodes, widened = list(model.graph.node), set[str]()
    del model.graph.node[:]
    for node in nodes:
        source = node.input[0] if node.op_type == "DequantizeLinear" else ""
        if source.removesuffix(".codes") in layers and source.endswith(".codes"):
            wide = f"{source}.int8"
            if wide not in widened:  # a layer may run more than once
                model.graph.node.append(helper.make_node("Cast", [source], [wide], name=wide, to=TensorProto.INT8))
                widened.add(wide)
            node.input[0] = wide
        model.graph.node.append(node)
