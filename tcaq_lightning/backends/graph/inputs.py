"""Inputs of an exported graph: a denoiser's arguments, which may be nested, as tensors by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import CONDITIONING, Sizes, example_samples
from tcaq_lightning.models.denoiser_calls import SHARED

EXAMPLE_BATCH = 2
EXAMPLE_TIMESTEPS = 250.0, 750.0
TIME_UNITS = {"FluxTransformer2DModel": 1000.0}
"""By class: of denoisers that are called with t divided by this."""
DEFAULTS = {"encoder_attention_mask": 1.0}
"""Inputs that may be left out, and the value that then stands for them everywhere."""
EMBEDDINGS: dict[str, tuple[str | None, ...]] = {
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "time_cond_proj_dim": (None,),
}
"""Settings of a UNet that change what it takes, and their values that `CONDITIONING` knows."""


@dataclass(frozen=True)
class GraphInput:
    """One input of the graph.

    Attributes:
        shape: without the batch's axis; all of it for a shared one.
        dtype: of torch, by name.
        shared: the same tensor for all rows of a batch, without an axis for them.
        default: what every element is if nothing is given; None where it must be given.
    """

    shape: tuple[int, ...]
    dtype: str
    shared: bool = False
    default: float | None = None

    @classmethod
    def of(cls, name: str, example: Tensor) -> GraphInput:
        """That of a named example."""
        shared = name in SHARED
        dtype = str(example.dtype).removeprefix("torch.")
        return cls(tuple(example.shape[not shared :]), dtype, shared, DEFAULTS.get(name))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GraphInput:
        """From JSON; KeyError or TypeError if it is something else."""
        return cls(**{**values, "shape": tuple(values["shape"])})

    def sizes(self, batch: int | str = "B") -> tuple[int | str, ...]:
        """The whole shape for a batch."""
        return self.shape if self.shared else (batch, *self.shape)

    def filled(self, batch: int) -> Tensor | None:
        """What stands for an input that is not given; None if nothing can."""
        if self.default is None:
            return None
        return torch.full((batch, *self.shape), self.default, dtype=getattr(torch, self.dtype))


def flatten(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of nested arguments by their path, without those that are None.

    >>> flatten({"x": 1, "added": {"ids": 2, "size": None}})
    {'x': 1, 'added.ids': 2}
    """
    leaves: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            leaves |= {f"{name}.{inner}": leaf for inner, leaf in flatten(value).items()}
        elif value is not None:
            leaves[name] = value
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`.

    >>> nest({"x": 1, "added.ids": 2})
    {'x': 1, 'added': {'ids': 2}}
    """
    arguments: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *outer, name = path.split(".")
        inside = arguments
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[name] = leaf
    return arguments


def example_inputs(denoiser: Any, sizes: Sizes | None = None, batch: int = EXAMPLE_BATCH) -> dict[str, Tensor]:
    """Inputs of a denoiser by name: the sample, the timestep, and what its config says it is conditioned on.

    Args:
        denoiser: of diffusers.
        sizes: of its inputs.
        batch: B.

    Returns:
        Noise in float32, but for labels, masks and positions.

    Raises:
        UserError: an input that the exporter does not know.
    """
    _check_known(denoiser)
    samples = example_samples(denoiser, batch, sizes)
    _, arguments = samples.arguments(torch.device("cpu"))
    unit = TIME_UNITS.get(type(denoiser).__name__, 1.0)
    timesteps = torch.tensor(EXAMPLE_TIMESTEPS).repeat(batch)[:batch] / unit
    inputs = {next(iter(inspect.signature(denoiser.forward).parameters)): samples.x.cpu(), "timestep": timesteps}
    arguments = {name: value for name, value in arguments.items() if name not in ("timestep", "return_dict")}
    inputs |= flatten(arguments)
    generator = torch.Generator().manual_seed(0)
    for name, x in inputs.items():
        drawn = x.is_floating_point() and name not in ("timestep", *SHARED, *DEFAULTS)
        inputs[name] = torch.randn(x.shape, generator=generator) if drawn else x
    return inputs


def _check_known(denoiser: Any) -> None:
    kind, config = type(denoiser).__name__, denoiser.config
    for setting, known in EMBEDDINGS.items():
        if config.get(setting) not in known:
            raise UserError(
                f"cannot export a {kind} with {setting} {config[setting]!r}: expected "
                f"{' or '.join(repr(value) for value in known)}"
            )
    required = [
        name
        for name, parameter in list(inspect.signature(denoiser.forward).parameters.items())[1:]
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and (parameter.default is parameter.empty or name.startswith("encoder_hidden_states"))
    ]
    if kind not in CONDITIONING and (set(required) - {"timestep"} or config.get("sample_size") is None):
        raise UserError(
            f"cannot export a {kind}, which takes {', '.join(required)}: expected x_t and timestep alone, or one of "
            f"{', '.join(CONDITIONING)}"
        )


def pipeline_sizes(pipeline: Any, tokens: int | None = None, latents: tuple[int, int] | None = None) -> Sizes:
    """Sizes of the inputs that a pipeline's call hands to its denoiser by default.

    Args:
        pipeline: of diffusers.
        tokens: length of the context, if it differs from the pipeline's.
        latents: height and width of the latents, if they differ from the pipeline's.
    """
    return Sizes(context_tokens(pipeline) if tokens is None else tokens, latents)


def context_tokens(pipeline: Any) -> int | None:
    """Length of the context that a pipeline's denoiser attends to; None where nothing says it.

    A class' single token; what its call takes of a text at most, behind CLIP's tokens if it has three encoders (Stable
    Diffusion 3); or what its tokenizer does.
    """
    if getattr(pipeline, "class_embedder", None) is not None:
        return 1
    longest = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    if longest is not None and isinstance(longest.default, int):
        clip = getattr(pipeline, "tokenizer_max_length", 0) if hasattr(pipeline, "tokenizer_3") else 0
        return int(longest.default) + int(clip)
    length = getattr(getattr(pipeline, "tokenizer", None), "model_max_length", None)
    return length if isinstance(length, int) and length < 10_000 else None  # some tokenizers know no limit


def call_of(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of a denoiser's call with inputs by name, in its type."""
    dtype = next(denoiser.parameters()).dtype
    return nest({n: x.to(dtype) if x.is_floating_point() and n != "timestep" else x for n, x in inputs.items()})


def first_name(inputs: Mapping[str, Any]) -> str:
    """Name of the noisy sample."""
    return next(iter(inputs))
