"""The denoiser that stands for an exported graph in a diffusers pipeline."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, nn

from tcaq_lightning.artifact.saved import SavedDenoiser
from tcaq_lightning.backends.description import Description
from tcaq_lightning.backends.graph.inputs import first_name, flatten
from tcaq_lightning.backends.refusals import refuse, stand_in_methods
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import Sizes
from tcaq_lightning.quantizers.uniform import keeping_type
from tcaq_lightning.runtime.provided import class_passing_for, original_class, with_signature


@dataclass
class EnginePrediction(BaseOutput):
    """What the denoiser returns; `sample` is the prediction, (B, C, H, W)."""

    sample: Tensor


class EngineDenoiser(nn.Module):
    """A denoiser that runs on an engine, to be used as the one that it stands for.

    Its class is derived from that one's and has its name, so that pipelines take, show and save it as such. What they
    ask of a denoiser beside its predictions, such as the width of an embedding, is answered by a description of it
    without weights. Settings that are about memory or speed do nothing; what would change what is computed is refused.
    Any number of threads may call it.

    Args:
        engine: runs the graph.
        denoiser_class: that it stands for.
        config: of the denoiser.
        saved: where its files are; None for one that is not saved.

    Attributes:
        engine: as given.
        saved: likewise.
    """

    stands_for: ClassVar[type]
    """Class of the denoiser."""
    signature: ClassVar[inspect.Signature]
    """Of its forward."""

    def __new__(cls, _engine: Any, denoiser_class: type[nn.Module], *_: Any) -> Any:
        """An instance of the derived class."""
        return _blank(original_class(denoiser_class))

    def __init__(
        self, engine: Any, denoiser_class: type[nn.Module], config: Any, saved: SavedDenoiser | None = None
    ) -> None:
        nn.Module.__init__(self)  # not the denoiser's own, which makes its weights
        self.engine, self.saved, self._internal_dict = engine, saved, config
        self._description = Description(original_class(denoiser_class).__name__, config)
        # Pipelines ask a denoiser's parameters for device and dtype.
        self._parameters["placement"] = nn.Parameter(torch.empty(0), requires_grad=False)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and stored ones open the graph again, see `Engine`."""
        return _blank, (self.stands_for,), dict(vars(self))

    @property
    def config(self) -> Any:
        """Of the denoiser."""
        return self._internal_dict

    @property
    def dtype(self) -> torch.dtype:
        """That the graph computes in, whatever the denoiser was converted to."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Of predictions."""
        placement = self._parameters["placement"]
        assert placement is not None
        return placement.device

    @property
    def sizes(self) -> Sizes:
        """Of the inputs that the graph was exported for."""
        inputs = self.engine.info.inputs
        context, sample = inputs.get("encoder_hidden_states"), inputs[first_name(inputs)].shape
        # Flux's patches of 2 x 2 latents come one after the other: any height and width that make as many
        latents = (2 * sample[0], 2) if "img_ids" in inputs else (sample[-2], sample[-1])
        return Sizes(None if context is None else context.shape[0], latents)

    def __getattr__(self, name: str) -> Any:
        """Of the denoiser that it stands for: what is no method, since these would act on nothing."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_description" not in self.__dict__:
                raise
        return self._description.attribute(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Parts and tensors are refused: the graph would not have them."""
        if isinstance(value, (nn.Module, Tensor)):
            refuse(name)
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Where `to` ends up: predictions change their device; the graph's type is its own."""
        return super()._apply(keeping_type(fn), recurse)  # type: ignore[no-untyped-call]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """One without elements, whose device and type pipelines look at.

        Raises:
            UserError: more are asked for; they are constants of the graph.
        """
        yield self._parameters["placement"]  # type: ignore[misc]
        refuse("parameters")

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Nothing; UserError if gradients are wanted."""
        if requires_grad:
            refuse("requires_grad_")
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the engine has compiled the graph."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the artifact's denoiser again; arguments are those of diffusers.

        Raises:
            UserError: its files are not there anymore or have changed, or a variant, pickle or an upload is asked for.
        """
        for name, given, wanted in (
            ("variant", variant, None),
            ("safe_serialization", safe_serialization, True),
            ("push_to_hub", push_to_hub, False),
        ):
            if given != wanted:
                raise UserError(
                    f"{name}: expected {wanted}, got {given!r}; an artifact is one safetensors file on disk"
                )
        if self.saved is None:
            raise UserError("save_pretrained: expected a denoiser of load_quantized, got one that is nowhere on disk")
        if is_main_process:
            self.saved.copy_to(Path(save_directory))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
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


@functools.cache
def _derived(kind: type) -> Any:
    """The class of what stands for denoisers of a class."""
    own: Any = kind
    space = {
        **stand_in_methods(kind, EngineDenoiser),
        "stands_for": kind,
        "signature": inspect.signature(own.forward),
        "forward": with_signature(own.forward, EngineDenoiser.forward),
    }
    return class_passing_for(kind, (EngineDenoiser, kind), space)


def _blank(kind: type) -> Any:
    """One without state, which copies and unpickled ones get afterwards."""
    return object.__new__(_derived(kind))
