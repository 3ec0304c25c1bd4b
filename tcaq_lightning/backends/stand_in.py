"""The denoiser that stands for an exported graph in a diffusers pipeline."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, nn

from tcaq_lightning.backends.graph.inputs import first_name, flatten
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import Sizes, on_meta


@dataclass
class EnginePrediction(BaseOutput):
    """What the denoiser returns; `sample` is the prediction, (B, C, H, W)."""

    sample: Tensor


class EngineDenoiser(nn.Module):
    """A denoiser that runs on an engine, to be used as the one that it stands for.

    What pipelines ask of a denoiser beside its predictions, such as the width of an embedding, is answered by a copy of
    it without weights.

    Attributes:
        engine: runs the graph.
        config: of the denoiser.
    """

    def __init__(self, engine: Any, denoiser_class: type[nn.Module], config: Any) -> None:
        super().__init__()
        self.engine, self.config, self.denoiser_class = engine, config, denoiser_class
        self.signature = inspect.signature(denoiser_class.forward)
        # Pipelines ask a denoiser's parameters for device and dtype.
        self.placement = nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        """That the graph computes in."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Of predictions."""
        return self.placement.device

    @property
    def sizes(self) -> Sizes:
        """Of the inputs that the graph was exported for."""
        inputs = self.engine.info.inputs
        context, sample = inputs.get("encoder_hidden_states"), inputs[first_name(inputs)].shape
        # Flux's patches of 2 x 2 latents come one after the other: any height and width that make as many
        latents = (2 * sample[0], 2) if "img_ids" in inputs else (sample[-2], sample[-1])
        return Sizes(None if context is None else context.shape[0], latents)

    def __getattr__(self, name: str) -> Any:
        """Of the denoiser that it stands for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "denoiser_class" not in self.__dict__:
                raise
        if "skeleton" not in self.__dict__:
            settings = {"_class_name": self.denoiser_class.__name__, **self.config}
            self.__dict__["skeleton"] = on_meta(settings)  # past nn.Module: it is no part of this one
        return getattr(self.__dict__["skeleton"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predict, with the arguments of the denoiser's own `forward`.

        Raises:
            UserError: shapes or inputs that the graph was not exported for.
        """
        given = dict(self.signature.bind(self, *args, **kwargs).arguments)
        given.pop("self")
        given |= given.pop("kwargs", {})
        return_dict = given.pop("return_dict", True)
        parameters = self.signature.parameters
        changed = {k: v for k, v in given.items() if k not in parameters or v is not parameters[k].default}
        leaves, wanted = flatten(changed), self.engine.info.inputs
        sample = leaves[first_name(wanted)]
        inputs = {name: self._input(name, leaves.pop(name, None), sample.shape[0]) for name in wanted}
        if leaves:
            raise UserError(
                f"{next(iter(leaves))}: the exported graph has no such input; expected only {', '.join(wanted)}"
            )
        prediction = torch.from_numpy(self.engine(inputs)).to(self.device, sample.dtype)
        return EnginePrediction(sample=prediction) if return_dict else (prediction,)

    def _input(self, name: str, value: Any, batch: int) -> Any:
        wanted = self.engine.info.inputs[name]
        if value is None:
            value = wanted.filled(batch)
        shape = ", ".join(map(str, wanted.sizes()))
        if value is None:
            raise UserError(f"{name}: the exported graph needs it, ({shape}), got nothing")
        tensor = torch.as_tensor(value).detach().to("cpu", getattr(torch, wanted.dtype))
        if not wanted.shape and tensor.numel() == 1:  # a single timestep is that of all samples
            tensor = tensor.reshape(1).expand(batch)
        if tuple(tensor.shape) != wanted.sizes(batch) or batch < 1:
            raise UserError(
                f"{name}: the graph was exported for shape ({shape}), got {tuple(tensor.shape)}; export it for others "
                f"with tokens (length of the context) and latents (height and width)"
            )
        return tensor.contiguous().numpy()
