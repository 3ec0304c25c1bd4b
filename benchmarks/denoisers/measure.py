"""What becomes of one tiny denoiser: replaced, compared, traced, run, saved, opened and exported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from benchmarks.denoisers.catalogue import denoiser_classes
from benchmarks.denoisers.examples import USUAL
from benchmarks.denoisers.others import OTHERS
from tcaq_lightning.artifact.blobs import fuse, restore, stored_tensors
from tcaq_lightning.artifact.freeze import freeze
from tcaq_lightning.artifact.structure import Structure, describe, rebuild
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.config import ActivationConfig, QuantizationConfig, WeightConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.graph import trace_units
from tcaq_lightning.nn.coverage import UNKNOWN_ATTENTION, CoverageRow
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.prepare import foresee_calls, quantize
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers import SoftmaxQuantizer
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.one_line import one_line

TOLERANCE = 2e-6
"""Largest squared error, relative to the prediction's squares, of a denoiser whose quantizers are off."""
WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers whose weights are to be quantized."""


EXAMPLES = {**USUAL, **OTHERS}
"""A tiny model of each class that has one."""


@dataclass
class Measured:
    """What became of a denoiser.

    Attributes:
        layers: layers with weights; quantized of them.
        weights: their parameters; quantized of them.
        attentions: calls of an attention in the full-precision model; calls that stay in floating point.
        units: number of units that were traced.
        equal: relative error with all quantizers off.
        reload: whether an artifact predicts the same bits.
        export: `yes`, or why not.
        failures: what went wrong, by step.
    """

    layers: tuple[int, int] = (0, 0)
    weights: tuple[int, int] = (0, 0)
    attentions: tuple[int, int] = (0, 0)
    units: int = 0
    equal: float | None = None
    reload: bool = False
    export: str = ""
    failures: dict[str, str] = field(default_factory=dict)


class FloatAttention(TorchFunctionMode):
    """Counts attentions that are computed in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of torch's."""
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def first_tensor(output: Any) -> Tensor:
    """All tensors of a prediction in one."""
    leaves = tree_leaves(dict(output) if hasattr(output, "items") else output)
    return torch.cat([x.detach().double().flatten() for x in leaves if isinstance(x, Tensor)])


@torch.no_grad()
def calibrated_to_nearest(denoiser: nn.Module, run: Callable[[], Any]) -> None:
    """Ranges of what the quantizers meet in one run, weights rounded to nearest."""
    seen: dict[str, tuple[float, float]] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not args[0].numel():
                return
            low, high = float(args[0].min()), float(args[0].max())
            before = seen.get(name, (low, high))
            seen[name] = min(low, before[0]), max(high, before[1])

        return hook

    handles = [q.register_forward_pre_hook(see(n)) for n, q in quantizers(denoiser).items()]
    with full_precision(denoiser):
        run()
    for handle in handles:
        handle.remove()
    for name, q in quantizers(denoiser).items():
        if name not in seen or isinstance(q, SoftmaxQuantizer):
            continue
        low, high = min(seen[name][0], 0.0), max(seen[name][1], 0.0)
        levels = 2**q.bits - 1
        step = max(high - low, 1e-6) / levels
        q.delta.fill_(step)
        q.zero_point.fill_(round(-low / step))
    for layer in quant_layers(denoiser).values():
        layer.learned_weight.search(layer.input_quantizer.r)


def measure(make: Callable[[], nn.Module], call: Callable[[nn.Module], Any], export: bool = True) -> Measured:
    """Do everything with a denoiser that can be done without a calibration.

    Args:
        make: builds it, the same each time.
        call: calls it on two samples.
        export: whether it is exported too.
    """
    found = Measured()
    full = make().requires_grad_(False).eval()
    config = QuantizationConfig(WeightConfig(4), ActivationConfig(8))
    groups = TimestepGroups([])
    twin = copy.deepcopy(full)

    def attempt(step: str, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except UserError as error:
            found.failures[step] = f"refused: {one_line(error)}"
        except Exception as error:  # noqa: BLE001 - a model raises whatever it likes; it is reported
            found.failures[step] = f"{type(error).__name__}: {one_line(error)}"
        return None

    layers = {n: m for n, m in full.named_modules() if isinstance(m, WEIGHTED)}
    with torch.no_grad(), FloatAttention() as plain:
        torch.manual_seed(0)
        expected = first_tensor(call(full))
    found.attentions = plain.calls, plain.calls
    numel = sum(m.weight.numel() for m in layers.values())
    found.layers, found.weights = (len(layers), 0), (numel, 0)

    def trace() -> None:
        found.units = len(trace_units(full, lambda: call(full)).names)

    attempt("trace", trace)
    rows: list[CoverageRow] | None = attempt("quantize", lambda: quantize(twin, config, groups))
    if rows is None:
        return found
    if (rows := attempt("calls", lambda: foresee_calls(twin, lambda: call(twin), rows or []))) is None:
        return found
    listed = sum(row.parameters for row in rows)
    parameters = sum(p.numel() for p in full.parameters())
    if listed != parameters:
        found.failures["coverage"] = f"{listed} of {parameters} parameters are listed"
    if kept := [row.name for row in rows if row.note.startswith(UNKNOWN_ATTENTION)]:
        found.failures["attention"] = f"unknown: {kept[0]}"
    done = quant_layers(twin)
    found.layers = len(layers), len(set(done) & set(layers))
    found.weights = numel, sum(layers[n].weight.numel() for n in done if n in layers)

    def off() -> None:
        with torch.no_grad(), full_precision(twin):
            torch.manual_seed(0)
            got = first_tensor(call(twin))
        found.equal = float((got - expected).square().sum() / expected.square().sum())

    attempt("off", off)

    def nearest() -> Tensor:
        calibrated_to_nearest(twin, lambda: call(twin))
        with torch.no_grad(), FloatAttention() as mode:
            torch.manual_seed(0)
            got = first_tensor(call(twin))
        found.attentions = plain.calls, mode.calls
        if not torch.isfinite(got).all():
            raise ValueError("not finite")
        return got

    if attempt("run", nearest) is None:
        return found

    def reload() -> None:
        freeze(twin)
        torch.manual_seed(0)
        with torch.no_grad():
            got = first_tensor(call(twin))
        structure = Structure.from_dict(describe(twin).to_dict())
        opened = make().requires_grad_(False).eval()
        rebuild(opened, structure)
        restore(stored_tensors(opened), fuse(stored_tensors(twin)))
        torch.manual_seed(0)
        with torch.no_grad():
            found.reload = torch.equal(first_tensor(call(opened)), got)

    attempt("reload", reload)
    if export and "reload" not in found.failures and attempt("export", lambda: build_graph(twin, "")) is not None:
        found.export = "yes"
    return found


def measure_example(name: str, export: bool = True) -> Measured:
    """Measure the example of a denoiser class, its parameters drawn so that none is trivial."""
    example = EXAMPLES[name]

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser: nn.Module = denoiser_classes()[name](**example.settings)
            for parameter in denoiser.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        return denoiser

    return measure(make, lambda denoiser: denoiser(**example.arguments()), export)
