"""The frozen denoiser as it is exported."""

from __future__ import annotations

import copy
import inspect

from torch import Tensor, nn

from tcaq_lightning.backends.graph.attention import graph_attention
from tcaq_lightning.backends.graph.inputs import first_name, nest
from tcaq_lightning.backends.graph.layers import GRAPH_LAYERS
from tcaq_lightning.backends.graph.operators import Constants
from tcaq_lightning.backends.graph.quantizers import GraphQuantizer, graph_quantizer
from tcaq_lightning.backends.graph.tables import Timesteps
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.families import is_attention
from tcaq_lightning.nn.attention import quantized_processor, replace_processor
from tcaq_lightning.nn.grouped import ungroup
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import quant_layers, set_submodule


class GraphDenoiser(nn.Module):
    """A denoiser to be traced: (sample, timestep, further inputs) -> prediction, all tensors.

    Attributes:
        denoiser: a copy of the frozen one in float32, its quantized parts replaced; the original stays as it is.
        names: of the further inputs in the denoiser's `forward`; `outer.inner` where they are nested.
    """

    def __init__(self, denoiser: nn.Module, boundaries: list[float], names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.denoiser, self.names = copy.deepcopy(denoiser).float(), names
        self.first_name = first_name(inspect.signature(denoiser.forward).parameters)
        ungroup(self.denoiser)
        self.times, self.constants = Timesteps(boundaries), Constants()
        self._replace()
        self.times.finish()

    def forward(self, sample: Tensor, timestep: Tensor, *further: Tensor) -> Tensor:
        """Prediction of (B, ...) samples at timesteps (B,)."""
        self.times.set(timestep)
        inputs = nest(dict(zip(self.names, further, strict=True)))
        inputs |= {self.first_name: sample, "timestep": timestep}
        prediction: Tensor = self.denoiser(**inputs, return_dict=False)[0]
        return prediction

    def _replace(self) -> None:
        made: dict[int, GraphQuantizer] = {}
        layers = quant_layers(self.denoiser).values()
        centred = {id(layer.input_quantizer) for layer in layers if layer.output_quantizer is not None}
        for name, module in list(self.denoiser.named_modules()):
            if isinstance(module, QuantLayer):
                replacement = GRAPH_LAYERS.get(type(module))
                if replacement is None:
                    raise UserError(
                        f"unsupported layer {name} ({type(module).__name__}): expected one of "
                        f"{', '.join(kind.__name__ for kind in GRAPH_LAYERS)}; keep it in full precision with a rule: "
                        f"quantization.rules: [{{pattern: {name}, keep: true}}]"
                    )
                source = module.input_quantizer
                if id(source) not in made:
                    made[id(source)] = graph_quantizer(name, source, self.times, self.constants, id(source) in centred)
                layer = replacement(module, made[id(source)], self.times, self.constants)
                set_submodule(self.denoiser, name, layer)
            elif is_attention(module) and (processor := quantized_processor(module)) is not None:
                replace_processor(module, graph_attention(name, processor, self.times, self.constants))
