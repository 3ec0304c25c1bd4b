"""How a pipeline is sampled: any denoiser and scheduler, with its conditioning and guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, LDMPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tcaq_lightning.config import ConditioningConfig, SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import (
    check_denoiser,
    configured_scheduler,
    find_decoder,
    find_denoiser,
    make_scheduler,
    one_by_one,
    other_networks,
    sample,
    sample_shape,
)
from tcaq_lightning.models.prompts import read_prompts
from tcaq_lightning.runtime.hashing import values_hash, weights_hash
from tcaq_lightning.runtime.seeds import derive

UNCONDITIONAL = (DDPMPipeline, DDIMPipeline, LDMPipeline)
"""Pipelines that our own loop samples: their calls fix a scheduler, or hand it what it does not take."""

GIVEN = {
    "num_inference_steps": "calibration.sampler.num_steps",
    "eta": "calibration.sampler.eta",
    "prompt": "conditioning.prompts",
    "negative_prompt": "conditioning.negative_prompt",
    "guidance_scale": "conditioning.guidance_scale",
    "class_labels": "conditioning.class_labels",
    "generator": "seed",
    "batch_size": "calibration.batch_size",
    "output_type": "nothing",
    "return_dict": "nothing",
}
"""Arguments of a pipeline's call that have a key of their own, or that are always the same."""

Inputs: TypeAlias = "Callable[[Sequence[int]], dict[str, Any]]"
"""A denoiser's arguments beside x_t and t, by name, for numbered samples: tensors (B, ...), or the same for all."""


class Sampling(Protocol):
    """A pipeline's way from numbered noises to samples, with any denoiser in the place of its own."""

    scheduler: Any

    def check_sampler(self, sampler: SamplerConfig, key: str) -> None:
        """Check that there is such a scheduler.

        Args:
            sampler: sampler to use.
            key: config key that errors name.

        Raises:
            UserError: unknown class, option or number of steps.
        """

    def check(self, denoiser: nn.Module, sampler: SamplerConfig, key: str) -> None:
        """Check that the denoiser can be sampled like this.

        Args:
            denoiser: full precision.
            sampler: sampler to use.
            key: config key that errors name.

        Raises:
            UserError: it cannot.
        """

    def channels(self, denoiser: nn.Module) -> int:
        """C of the samples."""

    def sample(self, denoiser: nn.Module, sampler: SamplerConfig, indices: Sequence[int], seed: int) -> Tensor:
        """Sample from numbered noises; sample i is the same whatever batch it is drawn in.

        Args:
            denoiser: full-precision or quantized.
            sampler: scheduler and steps.
            indices: numbers of the samples, which fix their noise and conditioning.
            seed: of the whole set.

        Returns:
            (B, C, H, W) images, in [-1, 1] for pixels.
        """

    def manifest(self) -> dict[str, Any]:
        """What decides the samples beside denoiser, sampler and noise, JSON-ready."""

    def hashes(self) -> dict[str, str]:
        """By name, hashes of what is read beside the pipeline's components, such as prompts."""


def make_sampling(pipeline: Any, conditioning: ConditioningConfig, inputs: Inputs | None = None) -> Sampling:
    """How to sample a pipeline.

    Args:
        pipeline: any diffusers pipeline from noise to images.
        conditioning: labels or prompts, and guidance.
        inputs: of a denoiser whose arguments the pipeline's call does not know; our own loop then samples it.

    Raises:
        UserError: conditioning that the pipeline does not take, or none where it needs it.
    """
    name, denoiser = find_denoiser(pipeline)
    if inputs is not None:
        return LoopSampling(pipeline.scheduler, find_decoder(other_networks(pipeline, name)), inputs)
    if type(pipeline) not in UNCONDITIONAL:
        return PipelineSampling(pipeline, name, conditioning)
    settings: Any = denoiser.config
    for kind in ("class_embed_type", "num_class_embeds"):
        if settings.get(kind):
            raise UserError(
                f"model.path: a {type(pipeline).__name__} has no class labels for its class-conditional {name}; "
                "expected a pipeline that hands it labels"
            )
    for key in ("prompts", "negative_prompt", "class_labels", "guidance_scale"):
        if getattr(conditioning, key) is not None:
            raise UserError(
                f"conditioning.{key}: a {type(pipeline).__name__} is unconditional; expected null, "
                f"got {getattr(conditioning, key)!r}"
            )
    return LoopSampling(pipeline.scheduler, find_decoder(other_networks(pipeline, name)))


class LoopSampling:
    """Sampling by the loop that all schedulers share.

    Args:
        scheduler: the pipeline's own.
        decoder: of latents into images, an autoencoder of diffusers; None where samples are pixels.
        inputs: what the denoiser takes beside x_t and t; None for nothing.
    """

    def __init__(self, scheduler: Any, decoder: Any = None, inputs: Inputs | None = None) -> None:
        self.scheduler, self.decoder = scheduler, decoder
        self.inputs: Inputs = inputs or (lambda _: {})

    def check_sampler(self, sampler: SamplerConfig, key: str) -> None:
        """As in `Sampling`."""
        make_scheduler(self.scheduler, sampler, key)

    def check(self, denoiser: nn.Module, sampler: SamplerConfig, key: str) -> None:
        """As in `Sampling`."""
        check_denoiser(denoiser, make_scheduler(self.scheduler, sampler, key), self.inputs([0, 1]))

    def channels(self, denoiser: nn.Module) -> int:
        """As in `Sampling`."""
        return sample_shape(denoiser)[0] if self.decoder is None else int(self.decoder.config.out_channels)

    @torch.no_grad()
    def sample(self, denoiser: nn.Module, sampler: SamplerConfig, indices: Sequence[int], seed: int) -> Tensor:
        """As in `Sampling`."""
        x = sample(denoiser, self.scheduler, sampler, indices, seed, self.inputs(indices))
        if self.decoder is None:
            return x.float()
        latents = x.to(self.decoder.device, self.decoder.dtype) / self.decoder.config.scaling_factor
        with one_by_one(self.decoder):
            images: Tensor = self.decoder.decode(latents, return_dict=False)[0]
        return images.float()

    def manifest(self) -> dict[str, Any]:
        """As in `Sampling`."""
        found = {"decoder": None if self.decoder is None else weights_hash(self.decoder)}
        return found | {name: value for name, value in self.hashes().items() if value}

    def hashes(self) -> dict[str, str]:
        """As in `Sampling`; a function is known by what it gives the first two samples."""
        leaves = tree_leaves(self.inputs([0, 1]))
        return {"inputs": values_hash(leaves)} if leaves else {}


class PipelineSampling:
    """Sampling by the pipeline's own call, which knows its conditioning and guidance.

    Args:
        pipeline: any diffusers pipeline from noise to images.
        name: of its denoiser.
        conditioning: labels or prompts, and guidance.
    """

    def __init__(self, pipeline: Any, name: str, conditioning: ConditioningConfig) -> None:
        self.pipeline, self.name, self.conditioning = pipeline, name, conditioning
        self.scheduler = pipeline.scheduler
        self._accepted = set(inspect.signature(type(pipeline).__call__).parameters)
        self._labels = self._class_labels()
        self._prompts = self._read_prompts()
        for key, argument in (("guidance_scale", "guidance_scale"), ("negative_prompt", "negative_prompt")):
            if getattr(conditioning, key) is not None and argument not in self._accepted:
                raise UserError(
                    f"conditioning.{key}: a {type(pipeline).__name__} has no {argument}; expected null, "
                    f"got {getattr(conditioning, key)!r}"
                )
        if unknown := sorted(set(conditioning.options) - self._accepted):
            raise UserError(
                f"conditioning.options: {type(pipeline).__name__} takes no {unknown[0]!r}; it takes "
                f"{sorted(self._accepted - {'self'})}"
            )

        for name in sorted(set(conditioning.options) & set(GIVEN)):
            raise UserError(f"conditioning.options: {name} is none of them; give {GIVEN[name]} in its place")

    def check_sampler(self, sampler: SamplerConfig, key: str) -> None:
        """As in `Sampling`."""
        configured_scheduler(self.scheduler, sampler, key)

    def check(self, denoiser: nn.Module, sampler: SamplerConfig, key: str) -> None:
        """As in `Sampling`; the rest shows when it is probed."""
        self.check_sampler(sampler, key)

    def channels(self, denoiser: nn.Module) -> int:
        """As in `Sampling`."""
        last: Any = getattr(self.pipeline, "vae", None) or denoiser
        return int(last.config.out_channels)

    @torch.no_grad()
    def sample(self, denoiser: nn.Module, sampler: SamplerConfig, indices: Sequence[int], seed: int) -> Tensor:
        """As in `Sampling`."""
        generators = [torch.Generator().manual_seed(derive(seed, i)) for i in indices]
        arguments: dict[str, Any] = {
            **self.conditioning.options,
            "num_inference_steps": sampler.num_steps,
            "generator": generators,
            "output_type": "np",
            "return_dict": False,
        }
        if self._labels is not None:
            arguments["class_labels"] = [self._labels[i % len(self._labels)] for i in indices]
        if self._prompts is not None:
            arguments["prompt"] = [self._prompts[i % len(self._prompts)] for i in indices]
        elif "batch_size" in self._accepted:
            arguments["batch_size"] = len(indices)
        if self.conditioning.negative_prompt is not None:
            arguments["negative_prompt"] = [self.conditioning.negative_prompt] * len(indices)
        if self.conditioning.guidance_scale is not None:
            arguments["guidance_scale"] = self.conditioning.guidance_scale
        if "eta" in self._accepted:
            arguments["eta"] = sampler.eta
        scheduler = configured_scheduler(self.scheduler, sampler)
        decoder = find_decoder(other_networks(self.pipeline, self.name))
        with self._with(denoiser, scheduler), one_by_one(decoder), torch.random.fork_rng():
            # Pipelines that hand their steps no generator draw from the global one.
            torch.manual_seed(derive(seed, indices[0]))
            images = self.pipeline(**arguments)[0]
        samples = torch.as_tensor(images).movedim(-1, 1) * 2 - 1  # (B, H, W, C) in [0, 1] -> (B, C, H, W)
        return samples.float().contiguous()

    @property
    def guidance_scale(self) -> float | None:
        """The guidance scale that is used; None for a pipeline without guidance."""
        if self.conditioning.guidance_scale is not None:
            return self.conditioning.guidance_scale
        own = inspect.signature(type(self.pipeline).__call__).parameters.get("guidance_scale")
        return None if own is None else own.default

    @cached_property
    def _components(self) -> dict[str, str]:
        """Hashes of the other components, which may be much larger than the denoiser: computed once."""
        return {name: weights_hash(part) for name, part in other_networks(self.pipeline, self.name).items()}

    def manifest(self) -> dict[str, Any]:
        """As in `Sampling`."""
        return {
            "pipeline": type(self.pipeline).__name__,
            "components": self._components,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.conditioning.negative_prompt,
            "options": self.conditioning.options,
            "class_labels": self._labels,
            "prompts": self._prompts,
        }

    def hashes(self) -> dict[str, str]:
        """As in `Sampling`."""
        return {} if self._prompts is None else {"prompts": values_hash(self._prompts)}

    @contextmanager
    def _with(self, denoiser: nn.Module, scheduler: Any) -> Iterator[None]:
        """The pipeline with other parts for a while, and without the checker that blanks what it takes for unsafe."""
        parts: dict[str, Any] = {self.name: denoiser, "scheduler": scheduler}
        if getattr(self.pipeline, "safety_checker", None) is not None:
            parts["safety_checker"] = None
        before = {name: getattr(self.pipeline, name) for name in parts}
        try:
            for name, part in parts.items():
                setattr(self.pipeline, name, part)
            yield
        finally:
            for name, part in before.items():
                setattr(self.pipeline, name, part)

    def _class_labels(self) -> list[int] | None:
        known = num_classes(self.pipeline, getattr(self.pipeline, self.name))
        given = self.conditioning.class_labels
        if known is None or "class_labels" not in self._accepted:
            if given is not None:
                raise UserError(
                    f"conditioning.class_labels: a {type(self.pipeline).__name__} with this {self.name} has no "
                    f"classes; expected null, got {given}"
                )
            return None
        if bad := [label for label in given or () if not 0 <= label < known]:
            raise UserError(
                f"conditioning.class_labels must be in 0..{known - 1} for the model's {known} classes, got {bad[0]}"
            )
        if given is not None:
            return list(given)
        order: list[int] = torch.randperm(known, generator=torch.Generator().manual_seed(0)).tolist()
        return order  # neighbouring classes of a data set are alike: fewer samples than classes are to be spread

    def _read_prompts(self) -> list[str] | None:
        path = self.conditioning.prompts
        if "prompt" not in self._accepted:
            if path is not None:
                raise UserError(
                    f"conditioning.prompts: a {type(self.pipeline).__name__} takes no prompts; expected null, "
                    f"got {path}"
                )
            return None
        if path is None:
            raise UserError(
                f"conditioning.prompts: a {type(self.pipeline).__name__} needs prompts; expected a text file with one "
                "a line, got null"
            )
        return read_prompts(path, "conditioning.prompts")


def num_classes(pipeline: DiffusionPipeline, denoiser: nn.Module) -> int | None:
    """K of a class-conditional pipeline, the label of "no class" not counted; None of any other."""
    config: Any = denoiser.config
    embedder = getattr(pipeline, "class_embedder", None)
    known = embedder.config.num_classes if embedder is not None else config.get("num_class_embeds")
    if known is None and config.get("norm_type") == "ada_norm_zero":
        known = config.get("num_embeds_ada_norm")
    return None if known is None else int(known)
